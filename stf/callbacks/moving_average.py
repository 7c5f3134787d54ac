"""Validation with averaged weights."""

import keras
import tensorflow as tf

from stf.training import averages
from stf.typing import Logs


class MovingAverage(keras.callbacks.Callback):
    """Validates with the moving average of the weights that the optimizer keeps; without one it does nothing.

    The weights themselves come back afterwards to the last bit (Keras' own SwapEMAWeights adds and subtracts), so that
    training and checkpoints are as if there had been no validation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tf.Tensor] = []

    def on_test_begin(self, logs: Logs = None) -> None:
        """Puts the averages in the weights' place."""
        pairs = averages(self.model.optimizer)
        self._kept = [keras.ops.copy(weight) for weight, _ in pairs]
        for weight, average in pairs:
            weight.assign(average)

    def on_test_end(self, logs: Logs = None) -> None:
        """Puts the weights back."""
        for (weight, _), kept in zip(averages(self.model.optimizer), self._kept, strict=True):
            weight.assign(kept)
        self._kept = []
