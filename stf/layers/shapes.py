"""Sizes of tensors, static where they are known."""

import tensorflow as tf


def batch_and_positions(x):
    """The first two sizes of a tensor, each an int where it is known."""
    return [tf.shape(x)[axis] if size is None else size for axis, size in enumerate(x.shape[:2])]
