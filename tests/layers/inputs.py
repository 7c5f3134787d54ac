"""What layers are called with."""

import numpy as np
import tensorflow as tf


def vectors(batch=2, positions=13, width=8):
    """The same numbers for the same sizes, float32 `[batch, position, width]`."""
    size = batch, positions, width
    return tf.constant(np.random.default_rng(size).normal(size=size), tf.float32)
