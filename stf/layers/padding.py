"""From a Keras mask to the lengths that the op takes."""

import tensorflow as tf


def lengths_of(mask):
    """Lengths `[batch]` of a mask `[batch, position]` whose padding is on the right, or None.

    Raises:
        InvalidArgumentError: when it runs, if a position in use follows one that is not. XLA leaves such checks out:
            there it is `nan_where_refused` that tells.
    """
    if mask is None:
        return None
    lengths, right = _lengths_and_whether_right(mask)
    fits = tf.reduce_all(right)
    check = tf.debugging.Assert(fits, ["The mask's padding must be on the right. Received: mask=", mask], summarize=16)
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(lengths)


def nan_where_refused(x, mask):
    """`x` `[batch, ...]`, and NaN in every sequence whose mask `lengths_of` refuses; so are gradients through it."""
    if mask is None:
        return x
    _, right = _lengths_and_whether_right(mask)
    factor = tf.where(right, tf.ones([], x.dtype), tf.constant(float("nan"), x.dtype))
    return x * tf.reshape(factor, [-1, *[1] * (x.shape.rank - 1)])


def _lengths_and_whether_right(mask):
    """Positions in use of each sequence, and whether they come before all others: `[batch]` each."""
    mask = tf.cast(mask, tf.bool)
    lengths = tf.reduce_sum(tf.cast(mask, tf.int32), axis=1)
    return lengths, tf.reduce_all(tf.equal(mask, tf.sequence_mask(lengths, tf.shape(mask)[1])), axis=1)
