"""Adam as the paper uses it, and loss scaling for float16."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="stf")
class AdamW(keras.optimizers.AdamW):
    """Adam with decoupled decay of weights that have two or more dimensions.

    Biases, normalisations' scales and the start vector are not decayed (the authors' follow-up code).
    """

    def build(self, variables):
        """Makes the slots, and a variable for the norm of the last gradient, before clipping."""
        super().build(variables)
        self.gradient_norm = tf.Variable(0.0, trainable=False, name="gradient_norm")

    def apply(self, grads, trainable_variables=None):
        """Applies gradients and notes their global norm."""
        grads = list(grads)
        if self.built:
            self.gradient_norm.assign(tf.linalg.global_norm([g for g in grads if g is not None]))
        return super().apply(grads, trainable_variables)

    def _use_weight_decay(self, variable):
        return len(variable.shape) >= 2


def optimizer(learning_rate, weight_decay=0.01, global_clipnorm=1.0, beta_2=0.999, average=None, **kwargs):
    """Adam of the paper's recipe: decay 0.01, gradients clipped to a global norm of 1.

    Args:
        learning_rate: a number or a schedule, such as `WarmupCosine`.
        weight_decay, global_clipnorm: from the paper.
        beta_2: from the authors' follow-up code.
        average: momentum of a moving average of the weights, to evaluate and sample with (see `use_average` and
            `stf.callbacks.MovingAverage`); 0.999 in the follow-up code. None keeps no average.
        **kwargs: further arguments of `keras.optimizers.AdamW`, such as `gradient_accumulation_steps`.

    Returns:
        An `AdamW` inside a `LossScale`, which skips steps whose gradients are not finite; under other policies than
        mixed_float16 its scale is 1, always.
    """
    if average is not None:
        kwargs |= {"use_ema": True, "ema_momentum": average}
    inner = AdamW(learning_rate, weight_decay=weight_decay, global_clipnorm=global_clipnorm, beta_2=beta_2, **kwargs)
    if keras.config.dtype_policy().name == "mixed_float16":
        return LossScale(inner)
    return LossScale(inner, initial_scale=1.0, floor=1.0, dynamic_growth_steps=2**31 - 1)


def averages(optimizer):
    """Pairs of (weight, variable of its moving average) of an optimizer; none where it keeps none."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not getattr(inner, "use_ema", False) or not inner.built:
        return []
    return list(zip(inner._trainable_variables, inner._model_variables_moving_average, strict=True))


def use_average(model):
    """Makes the moving average of a model's weights its weights, where its optimizer keeps one.

    For models loaded from a checkpoint. At the end of `fit` Keras does it itself.
    """
    for weight, average in averages(model.optimizer):
        weight.assign(average)


def steps_taken(optimizer):
    """Batches that an optimizer has seen: updates, and steps that were skipped."""
    return int(optimizer.iterations) + int(getattr(optimizer, "skipped", 0))


@keras.saving.register_keras_serializable(package="stf")
class LossScale(keras.optimizers.LossScaleOptimizer):
    """Dynamic loss scaling with a floor (Section 5.5; starting value and floor from the follow-up code).

    Keras' own halves the scale at every non-finite gradient without end; this one stops at `floor`. Steps whose
    gradients are not finite are skipped, and counted in the variables `skipped` (of all steps) and
    `skipped_in_a_row` (the last ones).

    Args:
        inner_optimizer: what takes the unscaled gradients.
        initial_scale: 2^16 unless given.
        floor: the least scale, 2^10 unless given.
        dynamic_growth_steps: steps without a non-finite gradient before the scale doubles.
    """

    def __init__(
        self,
        inner_optimizer,
        initial_scale=2.0**16,
        floor=2.0**10,
        dynamic_growth_steps=2000,
        **kwargs,
    ):
        super().__init__(
            inner_optimizer, initial_scale=initial_scale, dynamic_growth_steps=dynamic_growth_steps, **kwargs
        )
        if not 0 < floor <= initial_scale:
            raise ValueError(f"floor must be above 0 and at most initial_scale. Received: floor={floor!r}")
        self.floor = floor

    def build(self, var_list):
        """Makes the variables of the scale, the counters and the inner optimizer."""
        for name in ("skipped", "skipped_in_a_row"):
            counter = self.add_variable((), dtype="int", initializer="zeros", aggregation="none", name=name)
            setattr(self, name, counter)
        super().build(var_list)

    def _stateful_handle_finite_grads(self, grads, trainable_variables):
        super()._stateful_handle_finite_grads(grads, trainable_variables)
        self.skipped_in_a_row.assign(0)

    def _stateful_handle_non_finite_grads(self):
        super()._stateful_handle_non_finite_grads()
        self.dynamic_scale.assign(keras.ops.maximum(self.dynamic_scale, self.floor))
        self.skipped.assign_add(1)
        self.skipped_in_a_row.assign_add(1)

    def get_config(self):
        """The constructor's arguments."""
        return super().get_config() | {"floor": self.floor}
