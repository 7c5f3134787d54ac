"""What is moved between the devices that share a sequence: each movement and its gradient, all of them exact.

Everywhere a list has a tensor for each device, on that device. A movement's gradient is the movement back, where what
went to several devices comes together in the devices' order: the same bits every time.
"""

import contextlib
import math

import tensorflow as tf

WIDE = tf.complex128  # what copies move at a time: 16 bytes
_counted: list[list[int]] = []


@contextlib.contextmanager
def bytes_counted():
    """Counts what `send` sends in what is traced within: a list, of each tensor its bytes (of an unknown batch, one's).

    That is the stream, halos, attention's tensors and the blocks' weights; not tokens and the few tables around the
    blocks.
    """
    found = []
    _counted.append(found)
    try:
        yield found
    finally:
        _counted[:] = [each for each in _counted if each is not found]


def send(x, source, target, devices):
    """A tensor of one device on another, both given by their place among `devices`."""
    if source != target:
        for found in _counted:
            found.append(math.prod(1 if size is None else size for size in x.shape) * x.dtype.size)
    with tf.device(devices[target]):
        return tf.identity(x)


def broadcast(tensors, dtypes, devices):
    """Tensors of the first device on all of them, each cast to a dtype; their gradients add up in their own dtype.

    Args:
        tensors: a list.
        dtypes: of each on its way and on the devices.
        devices: names.

    Returns:
        For each device a list like `tensors`.
    """
    count = len(tensors)

    @tf.custom_gradient
    def run(*tensors):
        sent = [tf.cast(x, dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
        everywhere = [send(x, 0, s, devices) for s in range(len(devices)) for x in sent]

        def gradient(*upstream):
            found = []
            for at, x in enumerate(tensors):
                parts = [send(upstream[s * count + at], s, 0, devices) for s in range(len(devices))]
                with tf.device(devices[0]):
                    found.append(tf.add_n([tf.cast(part, x.dtype) for part in parts]))
            return found

        return everywhere, gradient

    with tf.device(devices[0]):
        everywhere = run(*tensors)
    return [everywhere[s * count : (s + 1) * count] for s in range(len(devices))]


def sent_first(x, *pieces):
    """A tensor that is there only behind pieces that its device sends.

    A copy begins when its sender has done whatever it was told to do before. Were a device told to go on first, what it
    sends would come behind all of that, and the others would wait for it.
    """
    with tf.control_dependencies(pieces):
        return tf.identity(x)


def on_each(devices, function, *lists):
    """For each device, on it, what a function gives of the device's own of each list."""
    found = []
    for device, *own in zip(devices, *lists, strict=True):
        with tf.device(device):
            found.append(function(*own))
    return found


def all_to_all(pieces, devices):
    """For each device what all devices have for it, in their order: `pieces[i][j]` is on device i for device j."""
    places = range(len(devices))
    return [[send(pieces[i][j], i, j, devices) for i in places] for j in places]


def to_remainders(streams, devices, modulus, dealt=None):
    """Positions dealt out by their remainders of `modulus`: of chunks of consecutive ones.

    Args:
        streams: `[batch, m, width]`, of m positions that follow one another, a multiple of `modulus`.
        devices: k devices, of which `modulus` is a multiple.
        modulus: device j gets the positions whose remainders are in the j-th k-th.
        dealt: a list that gets, for each device, what it sends.

    Returns:
        The same shapes: position t of device j is `t // run * modulus + j run + t % run` of the sequence, where run is
        `modulus / k`.
    """
    count, dtype = len(devices), streams[0].dtype
    positions, width = streams[0].shape[1:]

    def deal(x):
        wide = _wide(x)
        run = modulus // count * wide.shape[-1]
        return tf.unstack(tf.reshape(wide, [-1, positions // modulus, count, run]), axis=2)

    def join(parts):
        return _narrow(tf.concat(parts, axis=1), positions, width, dtype)

    pieces = on_each(devices, deal, streams)
    if dealt is not None:
        dealt.extend(pieces)
    return on_each(devices, join, all_to_all(pieces, devices))


def from_remainders(streams, devices, modulus, dealt=None):
    """Undoes `to_remainders`; each is the other's gradient."""
    count, dtype = len(devices), streams[0].dtype
    positions, width = streams[0].shape[1:]

    def deal(x):
        wide = _wide(x)
        return [rows(wide, j * positions // count, (j + 1) * positions // count) for j in range(count)]

    def join(parts):
        run = modulus // count * parts[0].shape[-1]
        parts = [tf.reshape(part, [-1, positions // modulus, run]) for part in parts]
        return _narrow(tf.stack(parts, axis=2), positions, width, dtype)

    pieces = on_each(devices, deal, streams)
    if dealt is not None:
        dealt.extend(pieces)
    return on_each(devices, join, all_to_all(pieces, devices))


def rows(x, begin, end):
    """`x[:, begin:end]`; of a single sequence nothing is copied."""
    if x.shape[0] != 1:
        return x[:, begin:end]
    return x[0][begin:end][None]


def _wide(x):
    """`[batch, position, width]` in numbers of 16 bytes, where the width allows it."""
    each = WIDE.size // x.dtype.size
    if x.shape[-1] % each or each == 1:
        return x
    return tf.bitcast(tf.reshape(x, [-1, x.shape[1], x.shape[2] // each, each]), WIDE)


def _narrow(x, positions, width, dtype):
    """`[batch, positions, width]` of a dtype, of what `_wide` gave in whatever shape."""
    if x.dtype != dtype:
        x = tf.bitcast(tf.reshape(x, [-1, positions, width * dtype.size // WIDE.size]), dtype)
    return tf.reshape(x, [-1, positions, width])


class HaloExchange:
    """The positions before each device's chunk, put in front of it; behind it, as zeros, on the first device.

    Args:
        devices: the devices.
        positions: of the halo, fewer than of a chunk.
    """

    def __init__(self, devices, positions):
        self._devices = devices
        self._positions = positions

    def put(self, streams):
        """Chunks `[batch, m, width]` with their halo."""
        h = self._positions
        if not h:
            return streams
        tails = on_each(self._devices, lambda x: rows(x, x.shape[1] - h, x.shape[1]), streams)

        def at(s, x, tail):
            if not s:
                return sent_first(tf.concat([x, tf.zeros_like(x[:, :h])], axis=1), tail)
            return tf.concat([send(tails[s - 1], s - 1, s, self._devices), sent_first(x, tail)], axis=1)

        return on_each(self._devices, at, *_numbered(streams), tails)

    def put_gradient(self, grads):
        """The gradient of `put`: what the halo got goes back to where it came from."""
        h = self._positions
        if not h:
            return grads
        fronts = on_each(self._devices, lambda x: rows(x, 0, h), grads)

        def at(s, x, front):
            x = sent_first(x, front)
            if s + 1 == len(self._devices):
                return x
            last = x.shape[1] - h
            tail = rows(x, last, x.shape[1]) + send(fronts[s + 1], s + 1, s, self._devices)
            return tf.concat([rows(x, 0, last), tail], axis=1)

        return on_each(self._devices, at, *_numbered(self.cut(grads)), fronts)

    def cut(self, streams):
        """Chunks without their halo."""
        h = self._positions

        def at(s, x):
            return rows(x, h, x.shape[1]) if s else rows(x, 0, x.shape[1] - h)

        return on_each(self._devices, at, *_numbered(streams)) if h else streams

    def cut_gradient(self, grads):
        """The gradient of `cut`: zeros in the halo's place."""
        h = self._positions

        def at(s, x):
            zeros = tf.zeros([tf.shape(x)[0], h, x.shape[2]], x.dtype)
            return tf.concat([zeros, x] if s else [x, zeros], axis=1)

        return on_each(self._devices, at, *_numbered(grads)) if h else grads


class HeadsExchange:
    """Queries, keys and values of some heads at all positions, of those of all heads at some; and heads' outputs back.

    Args:
        devices: the devices.
        partition: a `stf.patterns.partition.Heads`.
        key_dim, value_dim: depths of a head.
        positions: of a sequence, without padding.
        chunk: positions of each device.
    """

    def __init__(self, devices, partition, key_dim, value_dim, positions, chunk):
        self._devices = devices
        self._heads = partition.heads
        self._depths = [key_dim, key_dim, value_dim]
        self._positions = positions
        self._chunk = chunk

    def put(self, units):
        """`[batch, m, units]` of all heads, side by side, as `[batch, position, units]` of a device's own heads."""
        sizes = [sum(self._heads) * depth for depth in self._depths]

        def deal(x):
            parts = tf.split(x, sizes, axis=-1)
            of_devices = zip(*(self._deal(part, d) for part, d in zip(parts, self._depths, strict=True)), strict=True)
            return [tf.concat(own, axis=-1) for own in of_devices]

        pieces = all_to_all(on_each(self._devices, deal, units), self._devices)
        return on_each(self._devices, self._whole, pieces)

    def put_gradient(self, grads):
        """The gradient of `put`."""
        pieces = all_to_all(on_each(self._devices, self._chunks, grads), self._devices)

        def join(parts):
            split = [
                tf.split(part, [heads * depth for depth in self._depths], axis=-1)
                for part, heads in zip(parts, self._heads, strict=True)
            ]
            return tf.concat([part for of_kind in zip(*split, strict=True) for part in of_kind], axis=-1)

        return on_each(self._devices, join, pieces)

    def take(self, heads):
        """A device's own heads `[batch, position, own heads * value_dim]` as all heads at its positions."""
        pieces = all_to_all(on_each(self._devices, self._chunks, heads), self._devices)
        return on_each(self._devices, lambda parts: tf.concat(parts, axis=-1), pieces)

    def take_gradient(self, grads):
        """The gradient of `take`."""
        pieces = on_each(self._devices, lambda x: self._deal(x, self._depths[2]), grads)
        return on_each(self._devices, self._whole, all_to_all(pieces, self._devices))

    def _deal(self, x, depth):
        """Of all heads, for each device its own."""
        return tf.split(x, [heads * depth for heads in self._heads], axis=-1)

    def _whole(self, parts):
        """All positions, without padding."""
        return tf.concat(parts, axis=1)[:, : self._positions]

    def _chunks(self, x):
        """For each device its positions, with padding."""
        count = len(self._devices)
        return tf.split(tf.pad(x, [[0, 0], [0, count * self._chunk - self._positions], [0, 0]]), count, axis=1)


class ColumnsExchange:
    """Keys and values of columns of all blocks on the devices before, put in front of each device's chunk.

    Args:
        devices: the devices.
        partition: a `stf.patterns.partition.Columns`.
        num_heads, key_dim, value_dim: of the attention.
        chunk: positions of each device.
    """

    def __init__(self, devices, partition, num_heads, key_dim, value_dim, chunk):
        self._devices = devices
        self._partition = partition
        self._num_heads = num_heads
        self._depths = [key_dim, value_dim]
        self._query_width = num_heads * key_dim
        self._widths = [num_heads * key_dim, num_heads * value_dim]
        self._blocks = chunk // partition.stride
        self._before = [s * self._blocks * partition.count for s in range(len(devices))]

    def put(self, units):
        """Chunks `[batch, m, units]` behind the columns."""

        def columns(x):
            parts = tf.split(x, [self._query_width, *self._widths], axis=-1)[1:]
            return tf.concat([self._taken(part, d) for part, d in zip(parts, self._depths, strict=True)], axis=-1)

        taken = on_each(self._devices, columns, units)

        def at(s, x):
            x = sent_first(x, taken[s])
            if not s:
                return x
            front = tf.concat([send(taken[i], i, s, self._devices) for i in range(s)], axis=1)
            front = tf.pad(front, [[0, 0], [0, 0], [self._query_width, 0]])
            return tf.concat([front, x], axis=1)

        return on_each(self._devices, at, *_numbered(units))

    def put_gradient(self, grads):
        """The gradient of `put`: each device adds what the ones behind it have for its columns, in their order."""

        def deal(s, x):
            front = x[:, : self._before[s], self._query_width :]
            return tf.split(front, s, axis=1) if s else []

        pieces = on_each(self._devices, deal, *_numbered(grads))

        def at(s, x):
            x = sent_first(x, *pieces[s])
            received = [send(pieces[j][s], j, s, self._devices) for j in range(s + 1, len(self._devices))]
            if not received:
                return x
            parts = tf.split(tf.add_n(received), self._widths, axis=-1)
            parts = [self._put_back(part, d) for part, d in zip(parts, self._depths, strict=True)]
            return x + tf.pad(tf.concat(parts, axis=-1), [[0, 0], [0, 0], [self._query_width, 0]])

        return on_each(self._devices, at, *_numbered(self.take(grads)))

    def take(self, heads):
        """What is there of the chunks alone."""
        return on_each(self._devices, lambda s, x: x[:, self._before[s] :], *_numbered(heads))

    def take_gradient(self, grads):
        """The gradient of `take`: zeros in front."""
        return on_each(
            self._devices,
            lambda s, x: tf.pad(x, [[0, 0], [self._before[s], 0], [0, 0]]),
            *_numbered(grads),
        )

    def _taken(self, x, depth):
        """The columns of each head of all blocks, `[batch, block * column, head * depth]`."""
        x = tf.reshape(x, [-1, self._blocks, self._partition.stride, self._num_heads, depth])
        of_heads = [
            tf.concat([x[:, :, first:end, head] for first, end in ranges], axis=2)
            for head, ranges in enumerate(self._partition.columns)
        ]
        rows = self._blocks * self._partition.count
        return tf.reshape(tf.stack(of_heads, axis=3), [-1, rows, self._num_heads * depth])

    def _put_back(self, x, depth):
        """The gradient of `_taken`."""
        x = tf.reshape(x, [-1, self._blocks, self._partition.count, self._num_heads, depth])
        of_heads = []
        for head, ranges in enumerate(self._partition.columns):
            total, at = 0, 0
            for first, end in ranges:
                own = x[:, :, at : at + end - first, head]
                total += tf.pad(own, [[0, 0], [0, 0], [first, self._partition.stride - end], [0, 0]])
                at += end - first
            of_heads.append(total)
        rows = self._blocks * self._partition.stride
        return tf.reshape(tf.stack(of_heads, axis=3), [-1, rows, self._num_heads * depth])


def _numbered(xs):
    return range(len(xs)), xs
