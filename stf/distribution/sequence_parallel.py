"""Sequences whose positions lie on several devices: the strategy that says which, and the step that it makes."""

import numbers
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from stf.distribution.exchanges import on_each
from stf.distribution.replicas import replica_index, replicas
from stf.distribution.steps import ReplicatedTrainer

MEANS, SUMS = ("sum_over_batch_size", "mean"), ("sum",)


class SequenceParallel(tf.distribute.MirroredStrategy):
    """Divides the positions of each sequence over several devices of this machine, and batches over what is left.

    For sequences whose step does not fit into one device's memory, or takes too long on one. A
    `stf.models.SparseTransformer` that is made under it trains and evaluates so; what it computes is what one device
    computes, to rounding: losses, gradients, dropout, checkpoints. All else (`generate`, `predict`, `score`), and any
    other model, runs on the first device of those that share a sequence.

    The loss must be a mean or a sum over tokens, and the number of positions static: other lengths, and other sizes of
    a batch, are traced anew. `compute_loss` may be a model's own, `train_step` and `call` may not.

    Examples:
        >>> strategy = stf.distribution.SequenceParallel(devices=["CPU:0"])  # on GPUs: SequenceParallel(2)
        >>> with strategy.scope():
        ...     model = stf.models.SparseTransformer.from_preset("audio-small")
        ...     model.compile(stf.training.optimizer(1e-3), stf.training.cross_entropy())
        >>> strategy.devices_per_sequence
        1

    Args:
        devices_per_sequence: how many devices share a sequence; all of them unless given.
        devices: their names, those that share a sequence one behind another; all GPUs unless given, or the CPUs of a
            machine without one.

    Raises:
        ValueError: `devices` are no different names; `devices_per_sequence` does not divide their number.
    """

    def __init__(self, devices_per_sequence: int | None = None, devices: Sequence[str] | None = None) -> None:
        if devices is None:
            found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
            devices = [device.name for device in found]
        devices = devices if isinstance(devices, str) else list(devices)
        names = not isinstance(devices, str) and all(isinstance(device, str) for device in devices)
        if not names or not devices or len({tf.DeviceSpec.from_string(name) for name in devices}) < len(devices):
            raise ValueError(f"devices must be a list of different names of devices. Received: devices={devices!r}")
        count = len(devices) if devices_per_sequence is None else devices_per_sequence
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1 or len(devices) % count:
            raise ValueError(
                f"devices_per_sequence must be an int that divides the number of devices, {len(devices)}. "
                f"Received: devices_per_sequence={devices_per_sequence!r}"
            )
        self._groups: list[list[str]] = [devices[at : at + count] for at in range(0, len(devices), count)]
        super().__init__([group[0] for group in self._groups])

    @property
    def devices_per_sequence(self) -> int:
        """How many devices share a sequence."""
        return len(self._groups[0])

    def devices_of_replica(self) -> list[str]:
        """The devices that share the sequences of the replica in whose context, within `run`, this is called."""
        return self._groups[replica_index()]


class SequenceParallelTrainer(ReplicatedTrainer):
    """A `ReplicatedTrainer` each of whose replicas may be several devices, under a `SequenceParallel`.

    For models of tokens `[batch, position]` that have a method

        parallel_call(x, devices, training, finish)

    which runs the model on these devices and calls `finish(begin, end, y_pred)` on each of them with its outputs for
    the positions from `begin` to `end`, and returns the list of what that returned, differentiable.

    The loss is asked for by parts, `compute_loss` with a device's targets and outputs, so it must be a mean or a sum
    over tokens, and metrics are updated by parts. Targets are `[batch, position, ...]`, sample weights `[batch]`,
    `[batch, 1]` or `[batch, position]`, a part's outputs `[batch, end - begin, ...]`.
    """

    @property
    def _is_parallel(self):
        strategy = self._distribute_strategy
        return isinstance(strategy, SequenceParallel) and strategy.devices_per_sequence > 1

    @property
    def _takes_dynamic_shapes(self):
        return not self._is_parallel

    def _compiled(self, function, whole_step=False):
        # XLA's programs are of one device each.
        return function() if whole_step and self._is_parallel else super()._compiled(function)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Keras' `train_step`, for optimizers that are not stf's; under a `SequenceParallel` by parts."""
        if not self._is_parallel:
            return super().train_step(data)
        logs, grads = self._loss_and_gradients(data)
        self.optimizer.apply_gradients(list(zip(grads, self.trainable_variables, strict=True)))
        return logs

    _known_train_steps = (*ReplicatedTrainer._known_train_steps, train_step)

    def _train_in_replica(self, data, vote, even):
        if self._is_parallel and type(self).train_step not in self._known_train_steps:
            raise ValueError(
                "train_step must not be a model's own where several devices share a sequence; compute_loss may be. "
                f"Received: {type(self).__name__}.train_step"
            )
        return super()._train_in_replica(data, vote, even)

    def _loss_and_gradients(self, data):
        if not self._is_parallel:
            return super()._loss_and_gradients(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss, update_metrics = self._parallel_loss(x, y, sample_weight, training=True)
            scaled = self.optimizer.scale_loss(loss)
        grads = tape.gradient(scaled, [variable.value for variable in self.trainable_variables])
        return update_metrics(), grads

    def test_step(self, data: Any) -> dict[str, Any]:
        """Keras' `test_step`; under a `SequenceParallel` each device has its part of the sequences."""
        if not self._is_parallel:
            return super().test_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        return self._parallel_loss(x, y, sample_weight, training=False)[1]()

    def _parallel_loss(self, x, y, sample_weight, training):
        """The loss, and a function that updates the metrics and returns the logs."""
        devices = self._distribute_strategy.devices_of_replica()
        is_mean = self._loss_is_a_mean()
        tokens = keras.tree.flatten(x)[0]
        positions = tokens.shape[1]
        found = []

        def of_part(weights, begin, end):
            by_token = weights is not None and weights.shape.rank > 1 and weights.shape[1] != 1
            return weights[:, begin:end] if by_token else weights

        def finish(begin, end, y_pred):
            own = {"y": y[:, begin:end], "y_pred": y_pred, "sample_weight": of_part(sample_weight, begin, end)}
            found.append({name: None if value is None else tf.stop_gradient(value) for name, value in own.items()})
            loss = self.compute_loss(x=x, training=training, **own)
            return loss * ((end - begin) / positions) if is_mean else loss

        losses = self.parallel_call(x, devices, training, finish)
        loss = tf.add_n([tf.identity(part) for part in losses])

        def update_metrics():
            self._loss_tracker.update_state(loss * replicas(), sample_weight=tf.shape(tokens)[0])
            logs = on_each(devices[: len(found)], lambda own: self.compute_metrics(x, **own), found)
            return logs[-1]

        return loss, update_metrics

    def _loss_is_a_mean(self):
        """Whether the loss of all tokens is the mean of the parts', or their sum; ValueError where it is neither."""
        several = isinstance(self.loss, list | tuple | dict)
        reduction = type(self.loss).__name__ if several else getattr(self.loss, "reduction", MEANS[0])
        if reduction not in MEANS + SUMS:
            raise ValueError(
                f"The loss must be a mean or a sum over tokens for sequences that several devices share: a reduction "
                f"of {', '.join(MEANS + SUMS)}. Received: loss with reduction={reduction!r}"
            )
        return reduction in MEANS


def differentiable_on(device, function, *inputs):
    """A function of tensors, computed and differentiated on one device, wherever its inputs are.

    (A tape's own gradient would be computed where it is asked for.)
    """

    @tf.custom_gradient
    def run(*inputs):
        with tf.device(device), tf.GradientTape() as tape:
            tape.watch(inputs)
            output = function(*inputs)

        def back(upstream, variables=()):
            with tf.device(device):
                asked = [*inputs, *variables]  # those that the function reads, where it reads any
                grads = tape.gradient(output, asked, upstream, unconnected_gradients="zero")
            return (grads[: len(inputs)], grads[len(inputs) :]) if variables else grads

        return output, back

    return run(*inputs)


def values_of(variables):
    """The values of Keras variables, in this replica."""
    return [tf.convert_to_tensor(variable.value) for variable in variables]


def with_values(variables, values, function, *inputs):
    """What a function gives where variables have other values: tensors that lie where it is computed."""
    with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
        return function(*inputs)
