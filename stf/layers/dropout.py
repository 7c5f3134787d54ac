"""Dropout whose mask is a function of a seed, so that a recompute draws it again."""

from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

if TYPE_CHECKING:
    from keras.layers import Layer  # which `SavedSeed` stands before
else:
    Layer = object


class Part(NamedTuple):
    """Which positions of whole sequences a tensor has: its position t is their `first + t // run * step + t % run`.

    Attributes:
        length: positions of a whole sequence.
        first, run, step: see above; a run as long as the tensor for positions that follow one another.
    """

    length: int
    first: int
    run: int
    step: int


class SavedSeed(Layer):
    """For layers with a `seed_generator`: its state is saved with the weights, which Keras' own layers leave out.

    So training that goes on from a checkpoint drops what it would have dropped without a stop.
    """

    def save_own_variables(self, store: Any) -> None:
        """Saves the weights, and the seed."""
        super().save_own_variables(store)
        if self.seed_generator is not None:
            store["seed"] = tf.convert_to_tensor(self.seed_generator.state).numpy()

    def load_own_variables(self, store: Any) -> None:
        """Loads the weights, and the seed where it was saved."""
        super().load_own_variables({name: store[name] for name in store.keys() if name != "seed"})
        if self.seed_generator is not None and "seed" in store.keys():
            self.seed_generator.state.assign(store["seed"])


def stateless_dropout(x, rate, seed, part=None):
    """Zeros a share of `rate` of `x` and divides the rest by `1 - rate`.

    The mask is a hash of each element's row and column under the seed, in 32-bit integers: the same on every device,
    with and without XLA, and computed where it is used. (A random generator's words would go through memory, four bytes
    an element.)

    Args:
        x: `[..., width]`.
        rate: from 0 to less than 1.
        seed: int32 `[2]`; every two seeds give masks of their own.
        part: `Part`, where `x` is `[batch, position, width]` of a part of the positions: what stays is then what stays
            of whole sequences.
    """
    # In float32 for halves: rounded to bfloat16, the scale itself would be up to 0.2% off, in every element alike.
    wide = x.dtype if x.dtype.size >= 4 else tf.float32
    scaled = tf.cast(tf.cast(x, wide) * tf.constant(1 / (1 - rate), wide), x.dtype)
    return tf.where(keep_mask(tf.shape(x), rate, seed, part), scaled, tf.zeros([], x.dtype))


def keep_mask(shape, rate, seed, part=None):
    """Which elements stay: bool of a `shape` of one axis or more, each True with probability `1 - rate`."""
    words = random_words(shape, *tf.unstack(tf.bitcast(seed, tf.uint32)), part)
    return words >= tf.constant(min(round(rate * 2**32), 2**32 - 1), tf.uint32)


def random_words(shape, first, second, part=None):
    """Words of 32 random bits, each a hash of its row's number and its column under two words of a seed.

    Args:
        shape: of one axis or more, int32; the last axis has the columns.
        first, second: uint32 scalars.
        part: see `stateless_dropout`.

    Returns:
        uint32 of `shape`; a word does not depend on how many rows or columns there are.
    """
    shape = tf.convert_to_tensor(shape, tf.int32)
    rows = tf.range(tf.reduce_prod(tf.cast(shape[:-1], tf.int64)))
    if part is not None:
        positions = tf.cast(shape[1], tf.int64)
        t = rows % positions
        rows = rows // positions * part.length + part.first + t // part.run * part.step + t % part.run
    rows = tf.cast(rows, tf.uint32)
    rows = _mix(_mix(rows + _mix(first)) ^ _mix(second))
    columns = tf.cast(tf.range(tf.cast(shape[-1], tf.int64)), tf.uint32) * tf.constant(0x9E3779B9, tf.uint32)
    return _mix(tf.reshape(rows, tf.concat([shape[:-1], [1]], 0)) + columns)


def _mix(word):
    """A bijection of 32-bit words each of whose input bits turns half of the output's.

    Multipliers and shifts: C. Wellons' hash-prospector, the best known of this form (bias 0.107).
    """
    word ^= tf.bitwise.right_shift(word, tf.constant(16, tf.uint32))
    word *= tf.constant(0x21F0AAAD, tf.uint32)
    word ^= tf.bitwise.right_shift(word, tf.constant(15, tf.uint32))
    word *= tf.constant(0x735A2D97, tf.uint32)
    return word ^ tf.bitwise.right_shift(word, tf.constant(15, tf.uint32))
