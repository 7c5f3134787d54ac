"""The loss, and the metric that the field reports."""

import math
from typing import Any

import keras
import tensorflow as tf

from stf.typing import TensorLike


def cross_entropy() -> keras.losses.Loss:
    """Cross-entropy in nats of integer tokens under logits, the mean over all tokens."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@keras.saving.register_keras_serializable(package="stf")
class BitsPerDim(keras.metrics.Metric):
    """Mean cross-entropy in bits for each token: bits per dim of images, bits per byte of text.

    Call arguments: tokens `[batch, position]` and logits `[batch, position, vocab_size]`.
    """

    def __init__(self, name: str = "bits_per_dim", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self._cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
        self._nats = self.add_weight(name="nats", initializer="zeros")
        self._tokens = self.add_weight(name="tokens", initializer="zeros")

    def update_state(self, y_true: TensorLike, y_pred: TensorLike, sample_weight: TensorLike | None = None) -> None:
        """Adds a batch; `sample_weight` `[batch, position]` or `[batch]` weighs its tokens."""
        # By the loss' own way, so that its log-softmax is this one's too: both compilers see one computation.
        nats = self._cross_entropy(y_true, y_pred)
        weight = keras.ops.ones_like(nats)
        if sample_weight is not None:
            sample_weight = keras.ops.cast(sample_weight, nats.dtype)
            if len(sample_weight.shape) < len(nats.shape):
                sample_weight = keras.ops.expand_dims(sample_weight, -1)
            weight = weight * sample_weight
        self._nats.assign_add(keras.ops.sum(nats * weight))
        self._tokens.assign_add(keras.ops.sum(weight))

    def result(self) -> tf.Tensor:
        """Bits for each token so far."""
        return self._nats / (keras.ops.maximum(self._tokens, 1.0) * math.log(2))

    @property
    def tokens(self) -> tf.Tensor:
        """How many have counted so far, a float32 scalar."""
        return tf.convert_to_tensor(self._tokens.value)  # over all replicas

    def reset_state(self) -> None:
        """Forgets all batches."""
        self._nats.assign(0.0)
        self._tokens.assign(0.0)
