"""Position embeddings and the start vector (Child et al. 2019, Sections 5.1 and 5.3)."""

import math

import keras
import numpy as np
import tensorflow as tf


@keras.saving.register_keras_serializable(package="stf")
class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector for each coordinate of a position in an array of a given shape (Eq. 15).

    For images the shape is (rows, columns, channels): data embeddings. For text and audio it is
    (ceil(n / l), l), row and column in a matrix of the stride's width: attention embeddings.

    Example:
        >>> x = stf.layers.PositionEmbedding((32, 32, 3))(x)    # x is [batch, 3072, dim]

    Args:
        shape: sizes of the coordinates, the last one running fastest; their product is the longest sequence.
        embeddings_initializer: of every table. The paper's is N(0, 0.125 / sqrt(dim * len(shape))).
    """

    def __init__(self, shape, embeddings_initializer="uniform", **kwargs):
        super().__init__(**kwargs)
        self.shape = tuple(int(size) for size in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape must hold positive sizes. Received: shape={shape!r}")
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)
        self.supports_masking = True
        self.supports_jit = False

    def build(self, input_shape):
        """Makes a table for each coordinate."""
        initializer = self.embeddings_initializer
        self._tables = [
            self.add_weight(
                name=f"axis_{axis}",
                shape=(size, input_shape[-1]),
                initializer=initializer.__class__.from_config(initializer.get_config()),
            )
            for axis, size in enumerate(self.shape)
        ]
        self.built = True

    def at(self, positions):
        """The sum of the vectors of `positions`, `[..., dim]`."""
        total, later = 0, math.prod(self.shape)
        for size, table in zip(self.shape, self._tables, strict=True):
            later //= size
            total += tf.gather(tf.convert_to_tensor(table), positions // later % size)
        return tf.cast(total, self.compute_dtype)

    def call(self, inputs):
        """`inputs` `[batch, position, dim]`."""
        longest = math.prod(self.shape)
        if inputs.shape[1] is not None and inputs.shape[1] > longest:
            raise ValueError(f"inputs must have at most {longest} positions. Received: inputs of shape {inputs.shape}")
        return inputs + self.at(tf.range(tf.shape(inputs)[1]))

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape

    def get_config(self):
        """The constructor's arguments."""
        return super().get_config() | {
            "shape": list(self.shape),
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
        }


@keras.saving.register_keras_serializable(package="stf")
class StartShift(keras.layers.Layer):
    """Puts a learned start vector in front and drops the last position.

    So position t of what follows knows of the inputs before t alone, and predicts the t-th. The shift
    comes after the position embeddings are added.

    Args:
        start_initializer: of the start vector.
    """

    def __init__(self, start_initializer="zeros", **kwargs):
        super().__init__(**kwargs)
        self.start_initializer = keras.initializers.get(start_initializer)
        self.supports_jit = False

    def build(self, input_shape):
        """Makes the start vector."""
        self.start = self.add_weight(name="start", shape=(input_shape[-1],), initializer=self.start_initializer)
        self.built = True

    def call(self, inputs):
        """`inputs` `[batch, position, dim]`."""
        start = tf.cast(tf.convert_to_tensor(self.start), inputs.dtype)
        start = tf.broadcast_to(start, tf.concat([tf.shape(inputs)[:1], [1], tf.shape(inputs)[2:]], 0))
        shifted = tf.concat([start, inputs[:, :-1]], 1)
        return tf.ensure_shape(shifted[:, : tf.shape(inputs)[1]], inputs.shape)

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape

    def get_config(self):
        """The constructor's arguments."""
        return super().get_config() | {"start_initializer": keras.initializers.serialize(self.start_initializer)}


def attention_shape(length, stride):
    """Shape of the attention embedding for `length` positions: rows of `stride` columns."""
    return (int(np.ceil(length / stride)), stride)
