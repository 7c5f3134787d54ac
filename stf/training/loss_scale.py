"""Loss scaling for float16 (Child et al. 2019, Section 5.6)."""

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from stf.distribution.replicas import assign_all
from stf.training.optimizer import AdamW


@keras.saving.register_keras_serializable(package="stf")
class LossScale(keras.optimizers.LossScaleOptimizer):
    """Dynamic loss scaling with a floor (starting value and floor from the authors' follow-up code).

    Keras' own halves the scale at every non-finite gradient without end; this one stops at `floor`. Steps whose
    gradients are not finite are skipped.

    Args:
        inner_optimizer: what takes the unscaled gradients. An `AdamW` counts what is skipped, and is not given
            gradients that are divided, but the scale. Another one cannot be used under several replicas.
        initial_scale: 2^16 unless given.
        floor: below which the scale does not fall, 2^10 unless given.
        dynamic_growth_steps: steps without a non-finite gradient before the scale doubles.
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        initial_scale: float = 2.0**16,
        floor: float = 2.0**10,
        dynamic_growth_steps: int = 2000,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            inner_optimizer, initial_scale=initial_scale, dynamic_growth_steps=dynamic_growth_steps, **kwargs
        )
        if not 0 < floor <= initial_scale:
            raise ValueError(f"floor must be above 0 and at most initial_scale. Received: floor={floor!r}")
        self.floor = floor

    def apply(
        self, grads: Iterable[tf.Tensor | None], trainable_variables: Iterable[keras.Variable] | None = None
    ) -> None:
        """Updates variables by gradients of the scaled loss, unless those are not finite."""
        self._apply(grads, trainable_variables, summed=False)

    def apply_summed(
        self, grads: Iterable[tf.Tensor | None], trainable_variables: Iterable[keras.Variable] | None = None
    ) -> None:
        """Updates variables by gradients of the scaled loss that are the same on every replica; for an `AdamW`."""
        self._apply(grads, trainable_variables, summed=True)

    def _apply(self, grads, trainable_variables, summed):
        grads = list(grads)
        if trainable_variables is None and not self.built:
            raise ValueError("trainable_variables must be given before the optimizer is built. Received: None")
        if not self.built:
            with keras.name_scope(self.name):
                self.build(list(trainable_variables))
        inner, scale = self.inner_optimizer, tf.convert_to_tensor(self.dynamic_scale.value)
        if isinstance(inner, AdamW):
            finite = inner.apply_scaled(grads, trainable_variables, scale, summed)
        else:
            known = [grad for grad in grads if grad is not None]
            finite = tf.math.is_finite(tf.linalg.global_norm(known))
            unscaled = [None if grad is None else grad / tf.cast(scale, grad.dtype) for grad in grads]
            tf.cond(finite, lambda: _nothing(inner.apply(unscaled, trainable_variables)), _nothing)
        steps = self.step_counter.value
        grows = finite & tf.equal(steps, self.dynamic_growth_steps - 1)
        larger = tf.where(grows, scale * 2.0, scale)
        assign_all(
            [
                (self.dynamic_scale, tf.where(finite, larger, tf.maximum(scale * 0.5, self.floor))),
                (self.step_counter, tf.where(finite & ~grows, steps + 1, tf.zeros_like(steps))),
            ]
        )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {"floor": self.floor}


def _nothing(_=None):
    """What both branches of a condition return."""
    return tf.constant(0)
