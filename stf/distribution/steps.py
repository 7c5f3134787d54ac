"""`fit` and `evaluate` on several replicas: what Keras 3 cannot do yet, in one place.

Keras 3.15 stands in the way in three places, none of which a model has to use:

-   `Trainer._make_function` puts `tf.function(jit_compile=True)` around `Strategy.run`, so around all devices at once,
    and `jit_compile="auto"` is therefore never true under a strategy. Here each replica compiles its own share.
-   `reduce_per_replica` reduces scalars along an axis under MultiWorkerMirroredStrategy (keras #20585), so that `fit`
    fails for every model. Here logs are averaged within the replicas.
-   `_maybe_symbolic_build` takes a first batch, so that data which shuffle anew begin with their second order, and
    reduces it to its mean, which fails for nested batches, and makes tokens floats. Here shapes are enough.

docs/distribution.md has the reports. Without a strategy everything is Keras' own.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from stf.distribution.replicas import replicas, sum_over_replicas

if TYPE_CHECKING:
    from keras import Model  # which `ReplicatedTrainer` stands before
else:
    Model = object


class ReplicatedTrainer(Model):
    """For a `keras.Model`, before it in the list of bases: trains on all replicas of the strategy it was made under.

    Under a strategy a step is: loss and gradients of each replica's share, one compiled program each; one
    all-reduce of all gradients as one vector; clipping, the check for non-finite numbers and the update, one compiled
    program each, all of which compute the same. Optimizers other than `stf.training.AdamW` (in a
    `stf.training.LossScale` or not) do their own summing, uncompiled, as Keras has them; so does a model whose
    `train_step` is its own (`compute_loss` is what it can make its own without that).

    Attributes:
        asks_to_stop: set by whoever wants training to end, on one worker or more.
    """

    train_function: Any  # Keras' own
    test_function: Any
    asks_to_stop = False
    _takes_dynamic_shapes = True
    _known_train_steps: tuple[Callable[..., Any], ...] = (keras.Model.train_step,)
    _votes: Sequence[tf.Tensor] = ()

    @property
    def workers(self) -> int:
        """Processes that train this model together."""
        strategy = self.distribute_strategy
        count = strategy.num_replicas_in_sync
        return 1 if count == 1 else count // len(strategy.extended.worker_devices)

    @property
    def told_to_stop(self) -> bool:
        """Whether any worker asks to stop: the same answer on all of them, after the same step."""
        if self.workers == 1:
            return self.asks_to_stop
        return any(float(vote) > 0 for vote in self._votes[:-1])  # the last step may not have ended

    def agree(self, asked: bool) -> bool:
        """Whether any worker asks: to be called by all of them at the same place."""
        if self.workers == 1:
            return asked
        strategy = self.distribute_strategy

        def share(vote):
            return sum_over_replicas([tf.identity(vote)])[0]  # the copy is on the replica's device

        @tf.function(autograph=False)
        def count(vote):
            return strategy.experimental_local_results(strategy.run(share, args=(vote,)))

        return float(count(tf.constant(float(asked)))[0]) > 0

    def make_train_function(self, force: bool = False) -> Callable[..., Any]:
        """Keras' `make_train_function`, under a strategy another."""
        if self._distribute_strategy is None:
            return super().make_train_function(force)
        if self.train_function is None or force:
            self.train_function = self._make_replicated(self._train_in_replica)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable[..., Any]:
        """Keras' `make_test_function`, under a strategy another."""
        if self._distribute_strategy is None:
            return super().make_test_function(force)
        if self.test_function is None or force:
            self.test_function = self._make_replicated(self._test_in_replica)
        return self.test_function

    def _resolve_auto_jit_compile(self):
        # Keras' answer is never, under a strategy: its own step cannot be compiled there.
        strategy, self._distribute_strategy = self._distribute_strategy, None
        try:
            return super()._resolve_auto_jit_compile()
        finally:
            self._distribute_strategy = strategy

    def _make_replicated(self, step):
        """A function of an iterator that makes a step on all replicas, and gives its logs."""
        strategy = self.distribute_strategy

        def on_all(data, vote, even):
            # One replica's results, which are all replicas': those of another device would be waited for and copied.
            return strategy.experimental_local_results(strategy.run(step, args=(data, vote, even)))[0]

        if not self.run_eagerly:
            on_all = tf.function(on_all, reduce_retracing=self._takes_dynamic_shapes, autograph=False)
        self._votes = ()

        def function(iterator):
            even, logs = _has_even_batches(iterator), None
            for _, data in zip(range(self.steps_per_execution), iterator, strict=False):
                logs, vote = on_all(data, tf.constant(float(self.asks_to_stop)), even)
                self._votes = (*self._votes[-1:], vote)
            if logs is None:
                raise StopIteration
            return logs

        return function

    def _train_in_replica(self, data, vote, even):
        inner = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        ours = hasattr(self.optimizer, "apply_summed") and hasattr(inner, "apply_scaled")
        if not ours or type(self).train_step not in self._known_train_steps:
            return _mean_of_logs(self.train_step(data), vote)
        variables = self.trainable_variables
        sizes = [variable.shape.num_elements() for variable in variables]
        dtype = inner.all_reduce_dtype or keras.backend.result_type("float32", *(v.dtype for v in variables))
        check_all_reduce_dtype(dtype, self.distribute_strategy.extended.worker_devices)
        used = [True] * len(variables)  # whether a variable has a gradient

        def backward():
            logs, grads = self._loss_and_gradients(data)
            used[:] = (grad is not None for grad in grads)
            dense = (tf.zeros([n]) if g is None else g for g, n in zip(grads, sizes, strict=True))
            return logs, tf.concat([tf.cast(tf.reshape(tf.convert_to_tensor(g), [-1]), dtype) for g in dense], 0)

        def without_rows():
            return self.get_metrics_result(), tf.zeros([sum(sizes)], dtype)

        logs, vector = self._where_there_are_rows(data, even, backward, without_rows)
        if not even:
            rows = tf.cast(_rows(data), tf.float32)
            vector *= tf.cast(rows * replicas() / sum_over_replicas([rows])[0], dtype)
        [vector] = sum_over_replicas([vector])

        def update():
            parts = zip(tf.split(vector, sizes), variables, used, strict=True)
            self.optimizer.apply_summed(
                [tf.reshape(part, variable.shape) if has else None for part, variable, has in parts], variables
            )

        self._compiled(update)
        return _mean_of_logs(logs, vote)

    def _loss_and_gradients(self, data):
        """Logs, and the gradients of this replica's share of the mean loss."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
            self._loss_tracker.update_state(loss * replicas(), sample_weight=_rows(data))
            loss = self.optimizer.scale_loss(loss)
        grads = tape.gradient(loss, [variable.value for variable in self.trainable_variables])
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight), grads

    def _test_in_replica(self, data, vote, even):
        def step():
            return self.test_step(data)

        return _mean_of_logs(self._where_there_are_rows(data, even, step, self.get_metrics_result), vote)

    def _where_there_are_rows(self, data, even, step, otherwise):
        """A step, or what takes its place on a replica for which the last batch of a data set left no row."""
        if even:
            return self._compiled(step, whole_step=True)
        return tf.cond(_rows(data) > 0, lambda: self._compiled(step, whole_step=True), otherwise)

    def _compiled(self, function, whole_step=False):
        """The result of a function without arguments, compiled for this replica where the model is compiled by XLA."""
        if self.run_eagerly or not self.jit_compile:
            return function()
        # A new one each time: what is captured is this replica's own.
        return tf.function(function, jit_compile=True, autograph=False)()

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if self._distribute_strategy is None:
            return super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
        if iterator is not None:
            # Not by its first batch: data that shuffle anew would begin otherwise than on one device.
            spec = iterator.data_adapter.get_tf_dataset().element_spec
            data_batch = tf.nest.map_structure(_one_replicas_input, spec)
        with self.distribute_strategy.scope():
            self._symbolic_build(data_batch=data_batch)


def check_all_reduce_dtype(dtype, devices):
    """Raises ValueError for a dtype in which TensorFlow cannot sum over these devices (strings)."""
    if dtype == "bfloat16" and any("GPU" in device for device in devices):
        raise ValueError(
            "all_reduce_dtype must be one that NCCL sums for TensorFlow: 'float16', 'float32', or None. "
            "Received: all_reduce_dtype='bfloat16'"
        )


def _one_replicas_input(spec):
    """Shape and dtype of what a replica gets, of a spec of tensors or of several replicas' tensors."""
    spec = tf.nest.flatten(spec, expand_composites=True)[0]
    return keras.KerasTensor((None, *spec.shape[1:]), spec.dtype.name)


def _rows(data):
    """Examples of a batch."""
    return tf.shape(next(leaf for leaf in keras.tree.flatten(data) if leaf is not None))[0]


def _has_even_batches(iterator):
    """Whether every replica gets as many rows as any other in every step: where the data set says how many."""
    specs = tf.nest.flatten(getattr(iterator, "element_spec", None), expand_composites=True)
    return bool(specs) and all(getattr(spec, "shape", None) and spec.shape[0] is not None for spec in specs)


def _mean_of_logs(logs, vote):
    """Logs as the mean over all replicas, and the mean of the votes, by one sum of few numbers."""
    leaves = [tf.cast(tf.convert_to_tensor(leaf), tf.float32) for leaf in keras.tree.flatten(logs)]
    [total] = sum_over_replicas([tf.concat([tf.reshape(x, [-1]) for x in (*leaves, vote)], 0)])
    *means, vote = tf.split(total / replicas(), [*(tf.size(leaf) for leaf in leaves), 1])
    means = [tf.reshape(mean, tf.shape(leaf)) for mean, leaf in zip(means, leaves, strict=True)]
    return keras.tree.pack_sequence_as(logs, means), vote[0]
