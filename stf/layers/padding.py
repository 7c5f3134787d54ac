"""From a Keras mask to the lengths that the op takes."""

import tensorflow as tf


def lengths_of(mask):
    """Lengths `[batch]` of a mask `[batch, position]` whose padding is on the right, or None.

    Raises:
        InvalidArgumentError: when it runs, if a position in use follows one that is not.
    """
    if mask is None:
        return None
    mask = tf.cast(mask, tf.bool)
    lengths = tf.reduce_sum(tf.cast(mask, tf.int32), axis=1)
    right = tf.reduce_all(tf.equal(mask, tf.sequence_mask(lengths, tf.shape(mask)[1])))
    check = tf.debugging.Assert(right, ["The mask's padding must be on the right. Received: mask=", mask], summarize=16)
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(lengths)
