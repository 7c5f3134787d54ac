"""Adam as the paper uses it."""

from collections.abc import Iterable
from typing import Any, Literal

import keras
import tensorflow as tf

from stf.distribution.replicas import assign_all, sum_over_replicas


@keras.saving.register_keras_serializable(package="stf")
class AdamW(keras.optimizers.Optimizer):
    """Adam with decoupled weight decay, clipping by the global norm, and no step where that norm is not finite.

    One norm of all gradients, computed once, clips them, is logged, and says whether the step is taken: where it is
    not finite, weights and slots stay as they are to the last bit, and the step is counted as skipped.

    Decayed are kernels and tables: weights of two or more dimensions, without the axis of blocks that weights of a
    `stf.layers.SparseResidualStack` have in front, and without biases of whatever shape. Normalizations' scales and the
    start vector are not decayed. (The authors' follow-up code decays the start vector too.)

    Args:
        learning_rate: a float or a schedule, such as `WarmupCosine`, of the updates so far.
        weight_decay: times the learning rate, the share by which decayed weights shrink; 0.01 in the paper.
        beta_1, beta_2, epsilon: of Adam (Kingma and Ba 2015); 0.999 for beta_2 is the authors' follow-up code's.
        global_clipnorm: the largest norm of all gradients together, 1 in the paper; None does not clip.
        average: momentum of a moving average of the weights, or None for none. `averages` gives it.
        accumulation_steps: batches whose mean gradient makes one update.
        all_reduce_dtype: what gradients are sent and summed in over several replicas by `fit` of a
            `stf.models.SparseTransformer`; "float16" halves what is sent, as the paper does (Section 5.6), and so
            does "bfloat16", on CPUs alone. Unless given, the weights' own.

    Its variables, beside Adam's: `batches` (all that it has seen), `skipped`, `skipped_in_a_row`, and `gradient_norm`
    (of the last update, before clipping). `iterations` counts updates.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 0.001,
        weight_decay: float | None = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        global_clipnorm: float | None = 1.0,
        average: float | None = None,
        accumulation_steps: int = 1,
        all_reduce_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        name: str = "adamw",
    ) -> None:
        super().__init__(learning_rate, name=name)
        for name, value in (("beta_1", beta_1), ("beta_2", beta_2), ("average", average)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be from 0 to less than 1. Received: {name}={value!r}")
        if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
            raise ValueError(
                f"accumulation_steps must be an int, 1 or more. Received: accumulation_steps={accumulation_steps!r}"
            )
        if global_clipnorm is not None and not global_clipnorm > 0:
            raise ValueError(f"global_clipnorm must be above 0, or None. Received: global_clipnorm={global_clipnorm!r}")
        if weight_decay is not None and not weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, or None. Received: weight_decay={weight_decay!r}")
        if all_reduce_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                "all_reduce_dtype must be 'float32', 'bfloat16', 'float16', or None. "
                f"Received: all_reduce_dtype={all_reduce_dtype!r}"
            )
        self.weight_decay = weight_decay
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.global_clipnorm = global_clipnorm
        self.average = average
        self.accumulation_steps = accumulation_steps
        self.all_reduce_dtype = all_reduce_dtype

    def build(self, variables: Iterable[keras.Variable]) -> None:
        """Makes the slots of all variables, and the counters."""
        if self.built:
            return
        super().build(variables)
        self._slots = {
            name: [self.add_variable_from_reference(variable, name=name) for variable in variables]
            for name, wanted in (
                ("momentum", True),
                ("velocity", True),
                ("average", self.average is not None),
                ("accumulator", self.accumulation_steps > 1),
            )
            if wanted
        }
        for name in ("batches", "skipped", "skipped_in_a_row", "accumulated"):
            setattr(self, name, self._scalar(name, "int"))
        self.gradient_norm = self._scalar("gradient_norm", "float32")

    def _scalar(self, name, dtype):
        return self.add_variable((), dtype=dtype, aggregation="only_first_replica", name=name)

    def averages(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """Pairs of (weight, variable of its moving average); none where there is no average, or no update yet."""
        if not self.built or self.average is None or not int(tf.convert_to_tensor(self._iterations.value)):
            return []
        return list(zip(self._trainable_variables, self._slots["average"], strict=True))

    def apply(
        self, grads: Iterable[tf.Tensor | None], trainable_variables: Iterable[keras.Variable] | None = None
    ) -> None:
        """Updates variables by their gradients, which are summed over replicas first."""
        self.apply_scaled(grads, trainable_variables)

    def apply_summed(
        self, grads: Iterable[tf.Tensor | None], trainable_variables: Iterable[keras.Variable] | None = None
    ) -> None:
        """Updates variables by gradients that are the same on every replica."""
        self.apply_scaled(grads, trainable_variables, summed=True)

    def apply_scaled(
        self,
        grads: Iterable[tf.Tensor | None],
        trainable_variables: Iterable[keras.Variable] | None = None,
        scale: tf.Tensor | None = None,
        summed: bool = False,
    ) -> tf.Tensor:
        """Updates variables by gradients that are `scale` times too large.

        Args:
            grads: a gradient for each variable; None leaves that variable alone.
            trainable_variables: the variables; those that the optimizer was built with unless given.
            scale: float32 scalar; None for 1.
            summed: whether they are the sum over replicas already.

        Returns:
            Whether the gradients were finite, a bool scalar.
        """
        grads = list(grads)
        if trainable_variables is None and not self.built:
            raise ValueError("trainable_variables must be given before the optimizer is built. Received: None")
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if not self.built:
            with keras.name_scope(self.name):
                self.build(variables)
        indices = [self._get_variable_index(variable) for variable in variables]
        pairs = [(index, grad) for index, grad in zip(indices, grads, strict=True) if grad is not None]
        if not pairs:
            raise ValueError("grads must hold a gradient. Received: none for any variable")
        indices, grads = map(list, zip(*pairs, strict=True))
        # Dense, since rows of a slice may repeat; float32 (float64), whatever the loss was computed in.
        sums = [
            tf.cast(tf.convert_to_tensor(grad), self._trainable_variables[index].dtype)
            for index, grad in zip(indices, grads if summed else sum_over_replicas(grads), strict=True)
        ]
        inverse = None if scale is None else 1.0 / scale
        norm = _norm(sums, inverse)
        finite = tf.math.is_finite(norm)
        changes = self._counts(finite)
        if self.accumulation_steps == 1:
            taken = finite
        else:
            taken, sums, norm, more = self._accumulate(indices, sums, inverse, finite, norm)
            changes, inverse = changes + more, None
        changes.append((self.gradient_norm, tf.where(taken, norm, self.gradient_norm.value)))
        changes.append((self._iterations, self._iterations.value + tf.cast(taken, self._iterations.dtype)))
        factor = tf.constant(1.0) if self.global_clipnorm is None else tf.minimum(1.0, self.global_clipnorm / norm)
        factor = factor if inverse is None else factor * inverse
        weights = {index: variable.value for index, variable in enumerate(self._trainable_variables)}
        for index, grad in zip(indices, sums, strict=True):
            weights[index], slots = self._update(index, grad * tf.cast(factor, grad.dtype), taken)
            changes += [(self._trainable_variables[index], weights[index]), *slots]
        if self.average is not None:
            changes += [self._averaged(index, weight, taken) for index, weight in weights.items()]
        assign_all(changes)
        return finite

    def _counts(self, finite):
        one = tf.cast(finite, self.batches.dtype)
        return [
            (self.batches, self.batches.value + 1),
            (self.skipped, self.skipped.value + 1 - one),
            (self.skipped_in_a_row, (self.skipped_in_a_row.value + 1) * (1 - one)),
        ]

    def _accumulate(self, indices, grads, inverse, finite, norm):
        """Adds a batch's gradients to the sums, and empties those where an update is due.

        Returns:
            Whether an update is due, the mean gradients for it, their norm, and the changes of the sums.
        """
        count = self.accumulated.value + tf.cast(finite, self.accumulated.dtype)
        due = tf.equal(count, self.accumulation_steps) & finite
        changes, means = [(self.accumulated, tf.where(due, tf.zeros_like(count), count))], []
        for index, grad in zip(indices, grads, strict=True):
            held = self._slots["accumulator"][index]
            grad = grad if inverse is None else grad * tf.cast(inverse, grad.dtype)
            total = tf.where(finite, held.value + grad, held.value)
            changes.append((held, tf.where(due, tf.zeros_like(total), total)))
            means.append(total / self.accumulation_steps)
        return due, means, _norm(means), changes

    def _update(self, index, grad, taken):
        """Adam's update of a variable where it is taken: its new value, and the changes of its slots."""
        variable = self._trainable_variables[index]
        weight = tf.convert_to_tensor(variable.value)
        momentum, velocity = (tf.convert_to_tensor(self._slots[name][index].value) for name in ("momentum", "velocity"))
        # In float32 whatever the weight is: 0.999 is 1 in bfloat16.
        step = tf.cast(self._iterations.value + 1, tf.float32)
        rate = tf.cast(self.learning_rate, tf.float32)
        corrected = rate * tf.sqrt(1.0 - tf.pow(self.beta_2, step)) / (1.0 - tf.pow(self.beta_1, step))
        new_momentum = momentum + (grad - momentum) * (1.0 - self.beta_1)
        new_velocity = velocity + (tf.square(grad) - velocity) * (1.0 - self.beta_2)
        new_weight = weight - tf.cast(corrected, weight.dtype) * new_momentum / (tf.sqrt(new_velocity) + self.epsilon)
        if self._use_weight_decay(variable):
            new_weight -= weight * tf.cast(rate * self.weight_decay, weight.dtype)
        if variable.constraint is not None:
            new_weight = variable.constraint(new_weight)
        return tf.where(taken, new_weight, weight), [
            (self._slots["momentum"][index], tf.where(taken, new_momentum, momentum)),
            (self._slots["velocity"][index], tf.where(taken, new_velocity, velocity)),
        ]

    def _averaged(self, index, weight, taken):
        """The change of a weight's moving average, which begins as the weight after the first update."""
        average = self._slots["average"][index]
        kept = tf.cast(tf.where(tf.equal(self._iterations.value, 0), 0.0, self.average), average.dtype)
        mean = kept * average.value + (1.0 - kept) * tf.cast(weight, average.dtype)
        return average, tf.where(taken, mean, average.value)

    def _use_weight_decay(self, variable):
        rank = len(variable.shape) - getattr(variable, "stacked_axes", 0)
        return bool(self.weight_decay) and rank >= 2 and variable.name != "bias" and super()._use_weight_decay(variable)

    def finalize_variable_values(self, var_list: Iterable[keras.Variable]) -> None:
        """At the end of `fit`: the weights become their moving average, where there is one."""
        for weight, average in self.averages():
            weight.assign(average)

    def set_schedule(self, schedule: float | keras.optimizers.schedules.LearningRateSchedule) -> None:
        """Makes a schedule, or a number, the learning rate from here on, whatever it was before."""
        self._learning_rate = schedule

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        rate = super().get_config()["learning_rate"]
        names = "name weight_decay beta_1 beta_2 epsilon global_clipnorm average accumulation_steps all_reduce_dtype"
        return {"learning_rate": rate} | {name: getattr(self, name) for name in names.split()}


def _norm(grads, inverse=None):
    """The norm of all gradients together; with `inverse`, of `inverse` times them."""
    norm = tf.sqrt(tf.add_n([tf.cast(tf.reduce_sum(tf.square(grad)), tf.float32) for grad in grads]))
    return norm if inverse is None else norm * inverse


def optimizer(
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
    weight_decay: float | None = 0.01,
    global_clipnorm: float | None = 1.0,
    beta_2: float = 0.999,
    average: float | None = None,
    **kwargs: Any,
) -> AdamW:
    """Adam of the paper's recipe: decay 0.01, gradients clipped to a global norm of 1.

    Under mixed_float16 it belongs into a `LossScale`: `SparseTransformer.compile` puts it there, and Keras' own
    `compile` puts it into Keras' LossScaleOptimizer.

    Args:
        learning_rate: a float or a schedule, such as `WarmupCosine`.
        weight_decay, global_clipnorm: from the paper.
        beta_2: from the authors' follow-up code.
        average: momentum of a moving average of the weights, to evaluate and sample with (see `use_average` and
            `stf.callbacks.MovingAverage`); 0.999 in the follow-up code. None keeps no average.
        **kwargs: further arguments of `AdamW`, such as `accumulation_steps`.

    Returns:
        An `AdamW`.
    """
    return AdamW(learning_rate, weight_decay, beta_2=beta_2, global_clipnorm=global_clipnorm, average=average, **kwargs)


def averages(optimizer: keras.optimizers.Optimizer) -> list[tuple[keras.Variable, keras.Variable]]:
    """Pairs of (weight, variable of its moving average) of an optimizer; none where it keeps none."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return inner.averages() if isinstance(inner, AdamW) else []


def use_average(model: keras.Model) -> None:
    """Makes the moving average of a model's weights its weights, where its optimizer keeps one.

    For models loaded from a checkpoint; one that is not compiled stays as it is. At the end of `fit` Keras does it.
    """
    for weight, average in averages(getattr(model, "optimizer", None)):
        weight.assign(average)


def steps_taken(optimizer: keras.optimizers.Optimizer) -> int:
    """Batches that an optimizer has seen: of an `AdamW` also skipped ones, and those of an unfinished accumulation."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    batches = getattr(inner, "batches", optimizer.iterations)
    return int(tf.convert_to_tensor(batches))
