"""What all data sets give: byte sequences, and batches of them that a resumed run goes on with."""

import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING, Generic, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import tensorflow as tf

if TYPE_CHECKING:
    from stf.data.augmentation import ImageTransformations

CHUNK = 2**24  # bytes that are looked at at once


Data = TypeVar("Data")


class Splits(NamedTuple, Generic[Data]):
    """Training, validation and test data, and a line that says what they are.

    Each of the three is either uint8 `[examples, length]` (images), or a `Stream` (text, audio).
    """

    train: Data
    validation: Data
    test: Data
    description: str


class Stream:
    """Bytes one after another, of one or more recordings or files.

    Pieces may be memory maps: what is read of them is read when it is needed, and a stream may be larger than memory.

    Attributes:
        pieces: uint8 arrays.
        borders: int64 `[pieces + 1]`; piece p has positions `borders[p]` to `borders[p + 1]`. Nothing crosses a border.
    """

    def __init__(self, pieces: Iterable[npt.ArrayLike]) -> None:
        self.pieces = [piece if piece.dtype == np.uint8 else piece.astype(np.uint8) for piece in map(_array, pieces)]
        self.borders = np.cumsum([0, *map(len, self.pieces)]).astype(np.int64)

    @classmethod
    def of(cls, pieces: Iterable[npt.ArrayLike]) -> Self:
        """A stream of pieces, each a uint8 array."""
        return cls(pieces)

    def __len__(self) -> int:
        return int(self.borders[-1])

    @property
    def tokens(self) -> npt.NDArray[np.uint8]:
        """All of it, uint8 `[position]`, in memory."""
        return np.concatenate([np.zeros(0, np.uint8), *self.pieces])

    def read(self, begin: int, count: int) -> npt.NDArray[np.uint8]:
        """`count` positions from `begin` on, as far as their piece has them: uint8 `[position]`, in memory."""
        piece = int(np.searchsorted(self.borders, begin, side="right")) - 1
        begin -= int(self.borders[piece])
        return np.array(self.pieces[piece][begin : begin + count])

    def head(self, count: int) -> "Stream":
        """The first `count` positions, borders kept; all where count is 0."""
        return self.part(0, count) if count else self

    def part(self, begin: int, end: int) -> "Stream":
        """Positions from `begin` to before `end`, borders kept."""
        cuts = [
            piece[max(begin - low, 0) : max(end - low, 0)]
            for piece, low in zip(self.pieces, self.borders[:-1].tolist(), strict=True)
        ]
        return Stream([cut for cut in cuts if len(cut)])


def _array(piece):
    """A piece as an array, a memory map as it is."""
    return piece if isinstance(piece, np.ndarray) else np.asarray(piece, np.uint8)


def check_held_out(held_out):
    """Refuses shares of validation and test that are none."""
    if len(held_out) != 2 or not all(0 <= share < 1 for share in held_out) or sum(held_out) >= 1:
        raise ValueError(f"held_out must be two shares from 0, below 1 in all. Received: held_out={held_out}")


def counts_of(examples, held_out):
    """How many of some examples are for validation and for test, where each needs one and training too."""
    counts = [max(1, round(examples * share)) for share in held_out]
    if sum(counts) >= examples:
        raise ValueError(f"held_out must leave some of {examples} to train on. Received: held_out={held_out}")
    return counts


def batches(
    sequences: np.ndarray,
    batch_size: int,
    seed: int | None = None,
    skip: int = 0,
    shard: tuple[int, int] = (0, 1),
    transformations: "ImageTransformations | None" = None,
) -> tf.data.Dataset:
    """A `tf.data.Dataset` of (tokens, tokens), int32 `[batch, length]`, of whole examples.

    Which examples are in batch i depends on `seed` and i alone, so that going on after any batch costs nothing.

    Args:
        sequences: uint8 `[examples, length]`, a NumPy array; a memory map is read as its rows are needed.
        batch_size: sequences of a batch, over all workers.
        seed: shuffles anew every epoch, by this int from 0 to 2**32 - 1, and repeats for ever; None keeps the order,
            once, and drops nothing.
        skip: batches to leave out at the start: what a resumed run has seen already.
        shard: (index, count): which rows of each batch are this worker's, every count-th from index on.
        transformations: a `stf.data.ImageTransformations`, of which one is drawn for each row, or None. Batches
            are then ((tokens, conditions), tokens).

    Raises:
        ValueError: sequences are not uint8 `[examples, length]`, or there are none; a shard or a seed that is none;
            transformations without a seed, or of images of another size.
    """
    dtype, shape = getattr(sequences, "dtype", None), getattr(sequences, "shape", None)
    if dtype != np.uint8 or shape is None or len(shape) != 2:
        raise ValueError(
            f"sequences must be a uint8 array [examples, length]. Received: sequences of dtype {dtype}, shape {shape}"
        )
    if len(sequences) < 1 or batch_size < 1:
        raise ValueError(
            f"there must be examples and a batch_size of at least 1. "
            f"Received: {len(sequences)} examples, batch_size={batch_size}"
        )
    _check_shard(shard, batch_size)
    seed = None if seed is None else _check_seed(seed)
    if transformations is not None:
        if seed is None:
            raise ValueError("seed must be given where transformations are drawn. Received: seed=None")
        if np.prod(transformations.shape) != shape[1]:
            raise ValueError(
                f"transformations must be of images of {shape[1]} bytes. Received: transformations={transformations}"
            )
    index, count = shard
    examples = len(sequences)
    read = _reader(lambda rows: np.asarray(sequences[rows]), sequences.shape[1])

    def drawn(batch):
        place = batch * batch_size + tf.range(index, batch_size, count, tf.int64)
        epochs = place // examples
        # Of each word of a key 31 bits count.
        low, high = (tf.fill(tf.shape(epochs), tf.constant(word, tf.int64)) for word in (seed % 2**31, seed >> 31))
        keys = tf.stack([low, epochs, high], 1)
        # As tf.random.experimental.index_shuffle, which takes one key alone. Of its 4 rounds two epochs' orders of
        # 48,000 examples are correlated by 0.69, and neighbours lie evenly apart; from 8 rounds on neither shows.
        last = tf.constant(examples - 1, tf.int64)
        return tf.raw_ops.RandomIndexShuffle(index=place % examples, seed=keys, max_index=last, rounds=24)

    def kept(batch):
        begin = batch * batch_size
        return tf.range(begin + index, tf.minimum(begin + batch_size, examples), count)

    if seed is None:
        numbers = tf.data.Dataset.range(skip, -(-examples // batch_size))
        rows, size = kept, None
    else:
        numbers = tf.data.Dataset.counter(start=skip)
        rows, size = drawn, batch_size // count

    def load(batch):
        tokens = tf.ensure_shape(read(rows(batch)), [size, sequences.shape[1]])
        if transformations is None:
            return tokens, tokens
        conditions = transformations.draw(batch_size, tf.stack([batch, (seed << 1) + 1]))[index::count]
        tokens = tf.ensure_shape(transformations(tokens, conditions), tokens.shape)
        return (tokens, conditions), tokens

    return numbers.map(load, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _reader(read, length):
    """A NumPy function of int64 numbers, which reads a row of bytes for each, as one of tensors: int32 rows."""

    def tokens(numbers):
        rows = tf.numpy_function(lambda numbers: np.ascontiguousarray(read(numbers)), [numbers], tf.uint8, False)
        return tf.cast(tf.ensure_shape(rows, [None, length]), tf.int32)

    return tokens


def crops(
    stream: Stream | np.ndarray, length: int, batch_size: int, seed: int, skip: int = 0, shard: tuple[int, int] = (0, 1)
) -> tf.data.Dataset:
    """A `tf.data.Dataset` of (tokens, tokens), int32 `[batch, length]`: random crops of a stream, for ever.

    The crops of batch i depend on `seed` and i alone, so that going on after any batch costs nothing.

    Args:
        stream: a `Stream`, or uint8 `[position]`. Every crop within a piece is as likely as any other.
        length: positions of a crop. Pieces that are shorter are left out.
        batch_size: crops of a batch, over all workers.
        seed: of the crops, an int from 0 to 2**32 - 1.
        skip: batches to leave out at the start.
        shard: as for `batches`.

    Raises:
        ValueError: no piece is long enough, or another argument does not fit.
    """
    stream = _as_stream(stream)
    _check_shard(shard, batch_size)
    high = np.array(_check_seed(seed) << 32, np.uint64).astype(np.int64)
    pieces = np.diff(stream.borders)
    starts = np.maximum(pieces - length + 1, 0)  # where a crop may begin
    if length < 1 or not starts.any():
        raise ValueError(
            f"some piece must have length={length} positions. Received: {len(pieces)} pieces, "
            f"the longest of {max(pieces, default=0)} positions"
        )
    ends = tf.constant(np.cumsum(starts))
    shift = tf.constant(stream.borders[:-1] - np.concatenate([[0], np.cumsum(starts)[:-1]]))
    read = _reader(lambda starts: np.stack([stream.read(start, length) for start in starts]), length)

    def draw(batch):
        rows = tf.range(shard[0], batch_size, shard[1], tf.int64)

        def one(row):
            draw = tf.random.stateless_uniform([], [batch, row + high], 0, ends[-1], tf.int64)
            return draw + tf.gather(shift, tf.searchsorted(ends, [draw], side="right")[0])

        starts = tf.map_fn(one, rows, fn_output_signature=tf.TensorSpec([], tf.int64))
        tokens = tf.ensure_shape(read(starts), [batch_size // shard[1], length])
        return tokens, tokens

    numbers = tf.data.Dataset.counter(start=skip)
    return numbers.map(draw, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def windows(
    stream: Stream | np.ndarray, length: int, batch_size: int, context: int = 0, shard: tuple[int, int] = (0, 1)
) -> tf.data.Dataset:
    """A `tf.data.Dataset` of (tokens, tokens, weights) that counts every position of a stream once.

    Windows of `length` positions follow one another, each `length - context` further on. In each, positions that
    an earlier window has counted weigh 0, and so do the zeros behind a piece that is shorter than a window. The last
    window of a piece ends where the piece ends. (Table 3 of the paper: `context` is the least context of a counted
    position, but for a piece's first `length`.)

    Args:
        stream: a `Stream`, or uint8 `[position]`.
        length: positions of a window.
        batch_size: windows of a batch; the last batch may have fewer.
        context: positions of a window that an earlier one has counted, less than `length`.
        shard: as for `batches`.
    """
    stream = _as_stream(stream)
    _check_shard(shard, batch_size)
    if not 0 <= context < length or batch_size < 1:
        raise ValueError(
            f"context must be from 0 to length - 1 and batch_size at least 1. "
            f"Received: context={context}, length={length}, batch_size={batch_size}"
        )
    begins, counted, ends = [], [], []  # of each window: where it begins, from where on it counts, where its piece ends
    for low, high in zip(stream.borders[:-1], stream.borders[1:], strict=True):
        done = low
        while done < high:
            begin = low if done == low else min(done - context, max(low, high - length))
            begins.append(begin)
            counted.append(done)
            ends.append(high)
            done = min(begin + length, high)
    table = np.stack([np.asarray(x, np.int64) for x in (begins, counted, ends)], axis=1).reshape(-1, 3)

    def window(row):
        found = stream.read(row[0], length)
        return np.pad(found, (0, length - len(found)))

    read = _reader(lambda rows: np.array([*map(window, rows)], np.uint8).reshape(-1, length), length)

    def cut(rows):
        rows = rows[shard[0] :: shard[1]]
        places = rows[:, :1] + tf.range(length, dtype=tf.int64)
        inside = places < rows[:, 2:]
        found = read(rows)
        return found, found, tf.cast(inside & (places >= rows[:, 1:2]), tf.float32)

    dataset = tf.data.Dataset.from_tensor_slices(table).batch(batch_size)
    return dataset.map(cut, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def order0_entropy(sequences: Stream | npt.ArrayLike) -> float:
    """Bits for each byte of the best code that knows the bytes' frequencies and nothing else."""
    pieces = sequences.pieces if isinstance(sequences, Stream) else [np.asarray(sequences).reshape(-1)]
    counts = np.zeros(256, np.int64)
    for piece in pieces:
        for begin in range(0, len(piece), CHUNK):
            counts += np.bincount(piece[begin : begin + CHUNK], minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _as_stream(stream: Stream | np.ndarray) -> Stream:
    return stream if isinstance(stream, Stream) else Stream([np.asarray(stream)])


def _check_seed(seed):
    """`seed` as an int, or ValueError unless it is one of 32 bits."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an int from 0 to 2**32 - 1. Received: seed={seed!r}")
    return int(seed)


def _check_shard(shard, batch_size):
    index, count = shard
    if not 0 <= index < count or batch_size % count:
        raise ValueError(
            f"shard must be (index, count) with index below count, and count must divide batch_size. "
            f"Received: shard={shard}, batch_size={batch_size}"
        )
