"""The GPUs and machines that a run takes."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping

import tensorflow as tf

from stf.distribution.replicas import sum_over_replicas
from stf.distribution.sequence_parallel import SequenceParallel
from stf.experiments.errors import RunError

# What a collective operation ends with when another worker is gone.
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError)
INFINITE = tf.data.INFINITE_CARDINALITY


def make_strategy(environment: Mapping[str, str] = os.environ, devices_per_sequence: int = 1) -> tf.distribute.Strategy:
    """The machines of TF_CONFIG, or all GPUs of this machine, or the one device that it has.

    On several machines each process is started with the environment variable TF_CONFIG, in which all name the same
    cluster, and each its own place in it:

        TF_CONFIG='{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": "worker", "index": 0}}'

    To be called before TensorFlow computes anything.

    Args:
        environment: variables by name.
        devices_per_sequence: how many GPUs of this machine share the positions of each sequence, see
            `stf.distribution.SequenceParallel`.

    Returns:
        A MultiWorkerMirroredStrategy, a SequenceParallel, a MirroredStrategy, or TensorFlow's default strategy.

    Raises:
        RunError: TF_CONFIG is no description of a cluster with this process in it, or the cluster does not take it;
            the devices cannot be shared out so.
    """
    config = environment.get("TF_CONFIG")
    if devices_per_sequence != 1:
        if config:
            raise RunError(
                "--devices_per_sequence is for the GPUs of one machine, without TF_CONFIG. "
                f"Received: --devices_per_sequence={devices_per_sequence}, TF_CONFIG={config}"
            )
        try:
            return SequenceParallel(devices_per_sequence)
        except ValueError as error:
            raise RunError(f"--{error}") from error
    if config:
        index, workers = _place(config)
        if len(workers) > 1:
            try:
                return tf.distribute.MultiWorkerMirroredStrategy()
            except (tf.errors.OpError, RuntimeError, ValueError) as error:
                raise RunError(
                    f"Worker {index} ({workers[index]}) could not join the cluster of TF_CONFIG, {', '.join(workers)}: "
                    f"{first_line(error)}. Each worker must run, name the same cluster, and have a place of its own."
                ) from error
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def _place(config):
    """Index and addresses of the workers of a TF_CONFIG."""
    try:
        parsed = json.loads(config)
        workers, task = parsed["cluster"]["worker"], parsed["task"]
        kind, index = task["type"], task["index"]
        if kind != "worker" or set(parsed["cluster"]) != {"worker"}:
            raise ValueError("every task must be a worker")
        if not all(isinstance(worker, str) for worker in workers) or len(set(workers)) != len(workers):
            raise ValueError("the workers must be different addresses")
        if not isinstance(index, int) or not 0 <= index < len(workers):
            raise ValueError(f"worker {index} is not one of its {len(workers)} workers, 0 to {len(workers) - 1}")
    except (ValueError, KeyError, TypeError) as error:
        cause = f"{error} is missing" if isinstance(error, KeyError) else error
        raise RunError(
            f"TF_CONFIG does not describe a cluster with this process in it: {cause}. Received: TF_CONFIG={config}"
        ) from error
    return index, workers


def worker_of(strategy):
    """(index, count) of this process among those of a strategy."""
    resolver = strategy.cluster_resolver
    workers = resolver.cluster_spec().as_dict().get("worker", []) if resolver else []
    return (resolver.task_id, len(workers)) if len(workers) > 1 else (0, 1)


def is_first(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the only one, or the first of several: the one that writes."""
    return worker_of(strategy)[0] == 0


def distributed(
    make: Callable[[tuple[int, int]], tf.data.Dataset], strategy: tf.distribute.Strategy
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Batches of which each machine makes its own rows only.

    Args:
        make: function of a shard, (index, count), that returns a `tf.data.Dataset` of those rows of each batch:
            see `stf.data.batches`.
        strategy: whose machines take the shards.

    Returns:
        What `fit` and `evaluate` of a model of that strategy take.
    """
    if worker_of(strategy)[1] == 1:
        return make((0, 1))  # which Keras divides among this machine's replicas
    count = strategy.num_replicas_in_sync

    def of_worker(context):
        local = count // context.num_input_pipelines
        parts = [make((context.input_pipeline_id * local + replica, count)) for replica in range(local)]
        if local == 1:
            return parts[0]
        endless = all(part.cardinality() == INFINITE for part in parts)
        turns = tf.data.Dataset.choose_from_datasets(parts, tf.data.Dataset.range(local).repeat())
        return turns.apply(tf.data.experimental.assert_cardinality(INFINITE)) if endless else turns

    return strategy.distribute_datasets_from_function(of_worker)


def total(strategy, number):
    """The sum over all replicas of a number that each worker has: all of them call this, and wait for each other."""

    @tf.function(autograph=False)
    def add(x):
        def share():
            return sum_over_replicas([tf.identity(x)])[0]  # the copy is on the replica's device

        return strategy.experimental_local_results(strategy.run(share))

    with workers_watched(strategy):
        return float(add(tf.constant(number, tf.float64))[0])


@contextlib.contextmanager
def workers_watched(strategy):
    """Makes one line of what TensorFlow says when a worker of several is lost."""
    try:
        yield
    except LOST as error:
        if worker_of(strategy)[1] == 1:
            raise
        raise RunError(
            f"A worker of the cluster no longer answers ({first_line(error)}). Start all workers again with --resume."
        ) from error


def first_line(error):
    """What an error says first, without what surrounds it."""
    lines = str(getattr(error, "message", None) or error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
