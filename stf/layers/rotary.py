"""Rotary position embedding."""

from typing import Any

import keras
import tensorflow as tf

from stf.layers.validation import above_zero
from stf.typing import Shape, TensorLike


@keras.saving.register_keras_serializable(package="stf")
class RotaryEmbedding(keras.layers.Layer):
    """Turns each pair of a query's or key's numbers by an angle that grows with the position.

    The product of a query at i and a key at j then depends on i - j alone: component k of the first half of the depth
    d and that of the second are turned by `position * base^(-2 k / d) / scaling` (Su et al. 2021, "RoFormer",
    Section 3.2). Angles are computed in float64: a million positions have them exact.

    `SparseAttention(rotary=True)` has one. By itself it serves a decoder that goes on position by position.

    Examples:
        >>> rotary = stf.layers.RotaryEmbedding()
        >>> query = tf.random.normal([1, 1024, 8, 64])
        >>> one = rotary(query[:, 700:701], positions=[700])
        >>> bool(tf.reduce_all(abs(one - rotary(query)[:, 700:701]) < 1e-6))
        True

    Args:
        base: of the angles' geometric sequence.
        scaling: what positions are divided by, so that longer sequences than a model was trained with keep to the
            angles that it knows (Chen et al. 2023, "Extending context window of large language models via positional
            interpolation").

    Call arguments:
        inputs: floats `[batch, position, head, depth]`, or without heads, the depth even.
        positions: numbers `[position]` or `[batch, position]`, as they are whatever the layer computes in;
            0, 1, ... unless given.

    Returns:
        The same shape, in the dtype that the layer computes in.

    Raises:
        ValueError: a base or scaling that is not above 0; inputs that are no floats, or of an odd depth; positions of
            another number.
    """

    def __init__(self, base: float = 10_000.0, scaling: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False} | kwargs)  # positions are no numbers to round
        self.supports_masking = True
        self.base = above_zero("base", base)
        self.scaling = above_zero("scaling", scaling)
        self.built = True

    def call(self, inputs: TensorLike, positions: TensorLike | None = None) -> tf.Tensor:
        inputs = tf.convert_to_tensor(inputs)
        depth = inputs.shape[-1]
        if not inputs.dtype.is_floating or inputs.shape.rank not in (3, 4) or depth % 2:
            raise ValueError(
                "`inputs` must be floats [batch, position, head, depth] of an even depth. "
                f"Received: inputs of dtype {inputs.dtype.name}, shape {inputs.shape}"
            )
        inputs = tf.cast(inputs, self.compute_dtype)
        positions = tf.range(tf.shape(inputs, tf.int64)[1]) if positions is None else tf.convert_to_tensor(positions)
        if positions.shape.rank not in (1, 2) or not positions.shape[-1:].is_compatible_with(inputs.shape[1:2]):
            raise ValueError(
                f"`positions` must be [position] or [batch, position] with {inputs.shape[1]} positions. "
                f"Received: positions of shape {positions.shape}"
            )
        steps = tf.range(depth // 2, dtype=tf.float64) * (-2.0 / depth)
        frequencies = tf.pow(tf.constant(self.base, tf.float64), steps) / self.scaling
        angles = tf.cast(positions, tf.float64)[..., None] * frequencies  # [(batch,) position, depth / 2]
        for _ in inputs.shape[3:]:
            angles = angles[..., None, :]  # the same for all heads
        exact = tf.float64 if inputs.dtype == tf.float64 else tf.float32
        cos, sin = tf.cast(tf.cos(angles), exact), tf.cast(tf.sin(angles), exact)
        x, y = tf.split(tf.cast(inputs, exact), 2, axis=-1)
        return tf.cast(tf.concat([x * cos - y * sin, y * cos + x * sin], -1), inputs.dtype)

    def compute_output_shape(self, inputs_shape: Shape) -> Shape:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"base": self.base, "scaling": self.scaling}
