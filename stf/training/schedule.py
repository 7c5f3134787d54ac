"""The learning rate over a run."""

import math
from typing import Any

import keras
import tensorflow as tf

from stf.typing import TensorLike


@keras.saving.register_keras_serializable(package="stf")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0, then a cosine to 0 (Section 6 of the paper: 5,000 steps of warm-up).

    Args:
        peak: the rate at the warm-up's end.
        total_steps: steps of the whole run, after which the rate is 0.
        warmup_steps: steps of the warm-up.
    """

    def __init__(self, peak: float, total_steps: int, warmup_steps: int = 5000) -> None:
        super().__init__()
        if not 0 <= warmup_steps <= total_steps:
            raise ValueError(
                f"warmup_steps must be from 0 to total_steps={total_steps}. Received: warmup_steps={warmup_steps}"
            )
        self.peak = peak
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps

    def __call__(self, step: TensorLike) -> tf.Tensor:
        """The rate at a step, counted from 0."""
        step = tf.cast(step, tf.float32)
        rising = (step + 1) / max(1, self.warmup_steps)
        part = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        falling = 0.5 * (1 + tf.cos(math.pi * tf.clip_by_value(part, 0.0, 1.0)))
        return self.peak * tf.where(step < self.warmup_steps, rising, falling)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"peak": self.peak, "total_steps": self.total_steps, "warmup_steps": self.warmup_steps}
