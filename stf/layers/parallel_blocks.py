"""The blocks of a stack on several devices, each of which has some of the positions; and their gradient.

Everything of a block but its attention is by position, so a device runs whole blocks on what it has: with a halo, or on
positions dealt out so that a query's keys lie beside it (`stf.patterns.partition`). Only where attention reads all over
the sequence a block is run in three steps, with queries, keys and values exchanged before the second and its outputs
behind it.

One program holds all devices' operations, and what crosses from one to another is copied by TensorFlow, beside whatever
the devices compute. Sums over devices are made in their order: the same bits every run.
"""

import tensorflow as tf

from stf import ops
from stf.distribution.exchanges import (
    ColumnsExchange,
    HaloExchange,
    HeadsExchange,
    from_remainders,
    on_each,
    to_remainders,
)
from stf.layers.block import Block, BlockWeights
from stf.layers.dropout import Part
from stf.layers.residual_loop import ResidualLoop, vjp
from stf.ops.differentiation import differentiable_once
from stf.ops.residual_stack import ResidualStack, op_weights
from stf.patterns.partition import Columns, Halo, Remainders, partition

SEGMENT = 2  # blocks that are computed again at a time, as the GPU's op does


class ParallelBlocks:
    """Runs the blocks of a stack on several devices.

    Args:
        stack: a built `stf.layers.SparseResidualStack`.
        devices: names of the devices, one after another along the sequence.
        positions: of a sequence, without padding.
        chunk: positions of each device; all together `positions` or more.
        seed: int32 `[2]` of dropout, or None for none.
    """

    def __init__(self, stack, devices, positions, chunk, seed):
        self._stack = stack
        self._devices = devices
        self._positions = positions
        self._chunk = chunk
        self._seed = seed
        distinct = {stack.pattern(index) for index in range(stack.num_blocks)}
        self._partitions = {
            pattern: partition(pattern, stack.num_heads, positions, chunk, len(devices)) for pattern in distinct
        }
        self._runners = {}  # made once, so that what they compile is compiled once for all blocks alike

    def __call__(self, streams, weights, training):
        """What the blocks make of `[batch, chunk, width]` of each device, differentiable once.

        Args:
            streams: of each device its positions, in the sequence's order.
            weights: of each device the `BlockWeights` of all blocks.
            training: whether a gradient will be asked for.

        Returns:
            Tensors like `streams`.
        """
        count = len(streams)

        def apart(tensors):
            size = len(BlockWeights._fields)
            return tensors[:count], [tensors[at : at + size] for at in range(count, len(tensors), size)]

        def forward(*inputs):
            streams, kept = self._forward(*apart(inputs), training)
            return tuple(streams), kept

        def backward(kept, *tensors):
            grads, of_weights = self._backward(kept, list(tensors[:count]), apart(tensors[count:])[1])
            return *grads, *(grad for of_device in of_weights for grad in of_device)

        inputs = [*streams, *(w for of_device in weights for w in of_device)]
        return list(differentiable_once(forward, backward)(*inputs)) if training else list(forward(*inputs)[0])

    def _segments(self):
        """The blocks that are computed again together."""
        size = SEGMENT if self._stack.recompute is True else 1
        blocks = range(self._stack.num_blocks)
        return [blocks[at : at + size] for at in range(0, len(blocks), size)]

    def _forward(self, streams, weights, training):
        recompute = self._stack.recompute if training else True  # which keeps the least
        kept, modulus = [], 0
        for segment in self._segments():
            streams, modulus = self._lay(streams, modulus, segment[0])
            if training and recompute is True:
                kept.append(streams)
            for index in segment:
                streams, modulus = self._lay(streams, modulus, index)
                runner, given = self._runner(index, recompute), self._of_block(weights, index)
                streams, of_block = runner.forward(streams, *given)
                if training and recompute is not True:
                    kept.append(of_block)
        return self._lay(streams, modulus, None)[0], kept

    def _backward(self, kept, grads, weights):
        recompute = self._stack.recompute
        of_blocks = [None] * self._stack.num_blocks
        modulus = 0
        for segment, of_segment in zip(reversed(self._segments()), reversed(kept), strict=True):
            first, last = segment[0], segment[-1]
            signals, dealt = [[grad] for grad in grads], []
            grads, modulus = self._lay(grads, modulus, last, dealt)
            own = {first: of_segment}
            if recompute is True:
                streams, laid = on_each(self._devices, _after, of_segment, dealt or signals), self._modulus(first)
                for index in segment[:-1]:
                    streams, laid = self._lay(streams, laid, index)
                    runner, given = self._runner(index, False), self._of_block(weights, index)
                    streams, own[index] = runner.forward(streams, *given)
                streams, _ = self._lay(streams, laid, last)
                own[last] = self._runner(last, True).keep_inputs(streams)
            for index in reversed(segment):
                grads, modulus = self._lay(grads, modulus, index)
                runner = self._runner(index, False if recompute is True and index < last else recompute)
                grads, of_blocks[index] = runner.backward(own.pop(index), grads, *self._of_block(weights, index))
        grads, _ = self._lay(grads, modulus, None)
        stacked = on_each(
            self._devices,
            lambda s: [tf.concat(parts, 0) for parts in zip(*(of_block[s] for of_block in of_blocks), strict=True)],
            range(len(self._devices)),
        )
        return grads, stacked

    def _partition(self, index):
        return self._partitions[self._stack.pattern(index)]

    def _modulus(self, index):
        """Of what the positions of a block are dealt out by the remainders; 0 where they follow one another."""
        found = None if index is None else self._partition(index)
        return found.modulus if isinstance(found, Remainders) else 0

    def _lay(self, streams, modulus, index, dealt=None):
        """Streams as a block takes them (None: in the sequence's order), and the modulus of that."""
        wanted = self._modulus(index)
        if modulus and modulus != wanted:
            streams = from_remainders(streams, self._devices, modulus, None if wanted else dealt)
        if wanted and modulus != wanted:
            streams = to_remainders(streams, self._devices, wanted, dealt)
        return streams, wanted

    def _runner(self, index, recompute):
        """What runs a block, and keeps for its gradient what `recompute` says."""
        key = self._stack.pattern(index), recompute
        if key not in self._runners:
            self._runners[key] = self._make_runner(self._partition(index), recompute)
        return self._runners[key]

    def _make_runner(self, found, recompute):
        n, m, count = self._positions, self._chunk, len(self._devices)
        stack = self._stack
        if isinstance(found, Remainders):
            run = found.modulus // count
            parts = [Part(n, s * run, run, found.modulus) for s in range(count)]
            return _WholeBlocks(stack, self._devices, found.patterns, parts, recompute, 0)
        if isinstance(found, Halo):
            size = m + found.positions
            parts = [Part(n, max(0, s * m - found.positions), size, 0) for s in range(count)]
            return _WholeBlocks(stack, self._devices, found.patterns, parts, recompute, found.positions)
        if isinstance(found, Columns):
            exchange = ColumnsExchange(self._devices, found, stack.num_heads, stack.key_dim, stack.value_dim, m)
            heads = [stack.num_heads] * count
        else:
            exchange = HeadsExchange(self._devices, found, stack.key_dim, stack.value_dim, n, m)
            heads = found.heads
        parts = [Part(n, s * m, m, 0) for s in range(count)]
        blocks = [
            _DividedBlock(stack, pattern, part, own)
            for pattern, part, own in zip(found.patterns, parts, heads, strict=True)
        ]
        return _DividedBlocks(self._devices, blocks, recompute, exchange)

    def _of_block(self, weights, index):
        """The weights of one block on each device, `[1, ...]`, and the seed of its dropout there."""
        of_devices = on_each(self._devices, lambda own: [w[index : index + 1] for w in own], weights)
        if self._seed is None:
            return of_devices, [None] * len(of_devices)
        return of_devices, on_each(self._devices, lambda _: self._seed + tf.constant([index, 0]), of_devices)


class _WholeBlocks:
    """One block as each device runs it by itself, on its positions and their halo.

    Args:
        stack: the layer.
        devices: the devices.
        patterns: of each device.
        parts: of each device, which positions it runs.
        recompute: what `backward` computes again.
        halo: positions of the halo.
    """

    def __init__(self, stack, devices, patterns, parts, recompute, halo):
        self._devices = devices
        self._halo = HaloExchange(devices, halo)
        self._blocks = [_WholeBlock(stack, *own, recompute) for own in zip(patterns, parts, strict=True)]

    def forward(self, streams, weights, seeds):
        """The block's outputs, and what `backward` takes of it."""
        found = self._each("forward", self._halo.put(streams), weights, seeds)
        return self._halo.cut([output for output, _ in found]), [kept for _, kept in found]

    def keep_inputs(self, streams):
        """What `forward` would have `backward` take, where that is the inputs alone."""
        return self._each("keep_input", self._halo.put(streams))

    def backward(self, kept, grads, weights, seeds):
        """Gradients of the inputs; and those of each device's weights."""
        found = self._each("backward", kept, self._halo.cut_gradient(grads), weights, seeds)
        return self._halo.put_gradient([grad for grad, _ in found]), [of_weights for _, of_weights in found]

    def _each(self, method, *lists):
        return on_each(self._devices, lambda block, *own: getattr(block, method)(*own), self._blocks, *lists)


class _WholeBlock:
    """A block of one device: the GPU's op where it takes it, or TensorFlow's operations."""

    def __init__(self, stack, pattern, part, recompute):
        self._stack, self._pattern, self._part, self._recompute = stack, pattern, part, recompute
        self._forward, self._backward = compiled(self._forward), compiled(self._backward)

    def forward(self, stream, weights, seed):
        if self._stack.runs_as_one_op(stream):
            return self._op(seed).forward(stream, op_weights(weights, stream.dtype))
        return self._forward(stream, weights, seed)

    def keep_input(self, stream):
        if self._stack.runs_as_one_op(stream):
            return [tf.reshape(stream, [1, -1]), tf.zeros([1, 0])]
        return [], [(stream,)]

    def backward(self, kept, grad, weights, seed):
        if not self._stack.runs_as_one_op(grad):
            return self._backward(kept, grad, weights, seed)
        grad, *of_weights = self._op(seed).backward(kept, grad, op_weights(weights, grad.dtype))
        return grad, [tf.cast(of_weight, w.dtype) for of_weight, w in zip(of_weights, weights, strict=True)]

    def _op(self, seed):
        s = self._stack
        options = s.num_heads, s.key_dim, s.dropout, s.epsilon, self._recompute
        return ResidualStack(seed, [self._pattern], *options, self._part)

    def _loop(self, weights, seed):
        def make(_, w):
            return _block(self._stack, w, self._pattern, self._part)

        return ResidualLoop(make, BlockWeights(*weights), 1, self._recompute, seed)

    def _forward(self, stream, weights, seed):
        return self._loop(weights, seed).forward(stream, BlockWeights(*weights))

    def _backward(self, kept, grad, weights, seed):
        return self._loop(weights, seed).backward(BlockWeights(*weights), kept, grad)


class _DividedBlocks:
    """One block in three steps on each device, of which the second, attention, has other positions or heads.

    Args:
        devices: the devices.
        blocks: of each device a `_DividedBlock`.
        recompute: what `backward` computes again.
        exchange: a `ColumnsExchange` or `HeadsExchange`.
    """

    def __init__(self, devices, blocks, recompute, exchange):
        self._devices, self._blocks, self._recompute, self._exchange = devices, blocks, recompute, exchange

    def forward(self, streams, weights, seeds):
        """The block's outputs, and what `backward` takes of it."""
        gathered = self._gathered(streams, weights)
        attended = self._each("attend", gathered)
        heads = self._exchange.take([output for output, _ in attended])
        outputs = self._each("finish", streams, heads, weights, seeds)
        kept = {True: (streams,), "attention": (streams, attended), False: (streams, attended, gathered, heads)}
        return outputs, kept[self._recompute]

    def keep_inputs(self, streams):
        """What `forward` would have `backward` take, where that is the inputs alone."""
        return (streams,)

    def backward(self, kept, grads, weights, seeds):
        """Gradients of the inputs; and those of each device's weights."""
        streams, *more = kept
        attended = more[0] if more else None
        if len(more) == 3:
            _, gathered, heads = more
        else:
            streams = on_each(self._devices, _after, streams, [[grad] for grad in grads])
            gathered = self._gathered(streams, weights)
            attended = attended or self._each("attend", gathered)
            heads = self._exchange.take([output for output, _ in attended])
        ends = self._each("finish_gradient", streams, heads, weights, seeds, grads)
        to_streams, to_heads, of_ends = (list(of_kind) for of_kind in zip(*ends, strict=True))
        attention_grads = self._each("attention_gradient", gathered, attended, self._exchange.take_gradient(to_heads))
        to_units = self._exchange.put_gradient(attention_grads)
        begins = self._each("project_gradient", streams, weights, to_units, to_streams)
        of_weights = [[*of_begin, *of_end] for (_, of_begin), of_end in zip(begins, of_ends, strict=True)]
        return [grad for grad, _ in begins], of_weights

    def _gathered(self, streams, weights):
        return self._exchange.put(self._each("project", streams, weights))

    def _each(self, method, *lists):
        return on_each(self._devices, lambda block, *own: getattr(block, method)(*own), self._blocks, *lists)


class _DividedBlock:
    """What one device does of a block before, in and behind its attention.

    Args:
        stack: the layer.
        pattern: of this device's attention; None where it has no head.
        part: which positions it has.
        heads: of its attention.
    """

    def __init__(self, stack, pattern, part, heads):
        self._stack, self._pattern, self._part, self._heads = stack, pattern, part, heads
        for name in ("project", "finish", "finish_gradient", "project_gradient"):
            setattr(self, name, compiled(getattr(self, f"_{name}")))

    def attend(self, units):
        """Heads' outputs `[batch, position, heads * value_dim]`, and their log-sum-exps."""
        if not self._heads:
            return units, tf.zeros([tf.shape(units)[0], 0, units.shape[1]])
        output, log_sum_exp = self._attention.attend(units)
        return tf.reshape(output, [-1, units.shape[1], self._heads * self._stack.value_dim]), log_sum_exp

    def attention_gradient(self, units, attended, grad):
        """The gradient of `attend`'s input, of what it gave and the first output's gradient."""
        if not self._heads:
            return units
        shape = [-1, units.shape[1], self._heads, self._stack.value_dim]
        output, log_sum_exp = attended
        output, grad = tf.reshape(output, shape), tf.reshape(grad, shape)
        return self._attention.attention_gradient(units, output, log_sum_exp, grad)

    @property
    def _attention(self):
        return _block(self._stack, None, self._pattern, None, self._heads)

    def _block(self, weights):
        return _block(self._stack, BlockWeights(*(w[0] for w in weights)), self._pattern, self._part)

    def _project(self, stream, weights):
        return self._block(weights).query_key_value(stream)

    def _finish(self, stream, heads, weights, seed):
        block = self._block(weights)
        middle = block.add_attention(stream, heads, seed)
        return block.add_feed_forward(middle, block.hidden(middle), seed)

    def _finish_gradient(self, stream, heads, weights, seed, grad):
        _, back = vjp(lambda *x: self._finish(*x, weights, seed), weights[2:], stream, heads)
        (to_stream, to_heads), of_weights = back(grad)
        return to_stream, to_heads, of_weights

    def _project_gradient(self, stream, weights, grad, before):
        _, back = vjp(lambda x: self._project(x, weights), weights[:2], stream)
        (to_stream,), of_weights = back(grad)
        return before + to_stream, of_weights


def compiled(function):
    """A function of tensors as one program of XLA's where it runs on a GPU."""
    if not ops.runs_on_a_gpu():
        return function
    return tf.function(function, jit_compile=True, autograph=False)


def _block(stack, weights, pattern, part, heads=None):
    heads = stack.num_heads if heads is None else heads
    return Block(weights, pattern, heads, stack.key_dim, stack.value_dim, stack.dropout, stack.epsilon, part)


def _after(x, signals):
    """A tensor that is there only behind others: what is computed again of it does not begin before."""
    with tf.control_dependencies(signals):
        return tf.identity(x)
