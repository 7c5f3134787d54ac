"""A run that leaves a checkpoint and a log, is stopped by a signal without loss, and goes on from where it was."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from stf.callbacks import (
    Checkpoint,
    CheckpointError,
    FirstStep,
    MovingAverage,
    StopOnNonFinite,
    StopOnSignal,
    TrainingLog,
    load_checkpoint,
)
from stf.callbacks.checkpoint import exists as checkpoint_exists
from stf.experiments import cluster
from stf.experiments.errors import RunError
from stf.experiments.record import Record
from stf.training.optimizer import steps_taken, use_average
from stf.typing import PathLike


def run(
    make_model: Callable[[], keras.Model],
    train: Callable[[int, tuple[int, int]], tf.data.Dataset],
    validation: Callable[[tuple[int, int]], tf.data.Dataset],
    run_dir: PathLike,
    steps: int,
    epochs: int,
    resume: bool = False,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    overwrite: bool = False,
    settings: dict[str, Any] | None = None,
    schedule: keras.optimizers.schedules.LearningRateSchedule | None = None,
    checkpoint_minutes: float | None = 10.0,
    strategy: tf.distribute.Strategy | None = None,
) -> keras.Model:
    """Trains a model up to a step; each of `epochs` parts ends with validation and a checkpoint.

    SIGTERM and Ctrl-C end it after the step in hand, with a checkpoint. With a strategy of several machines each of
    them calls this alike; the first one writes what is written, and `run_dir` must be a folder that all of them see.

    Args:
        make_model: function without arguments that returns a new, compiled model.
        train: function of the batches to leave out at the start, and of a shard (index, count), that returns an endless
            `tf.data.Dataset` of those rows of each batch: see `stf.data.batches`.
        validation: function of a shard that returns a finite dataset.
        run_dir: folder of `checkpoint.keras`, of the one before it, of `run.json` and of TensorBoard's `log`.
        steps: of the whole run.
        epochs: parts of the run, of `steps // epochs` steps; the last has what remains too.
        resume: go on from the checkpoint: the model, its optimizer, its seeds and its place in the data are as they
            were.
        callbacks: more callbacks, of the first machine.
        overwrite: begin anew where the folder has a checkpoint, which is moved to `checkpoint.overwritten.keras`.
        settings: what the run is started with, as far as it must be the same when it goes on: names and values that
            JSON has. Kept in `run.json`.
        schedule: the learning rate of `steps` steps, for a run that goes on with more than it was started with.
        checkpoint_minutes: a checkpoint is also written when so many minutes have passed since the last; None: never.
        strategy: of tf.distribute, as `stf.experiments.make_strategy` chooses it; the one in scope unless given.

    Returns:
        The trained model; where the optimizer keeps a moving average of the weights, with that.

    Raises:
        ValueError: there are fewer steps than epochs.
        RunError: the folder has a checkpoint and neither `resume` nor `overwrite` is set, or has none to resume from;
            the run was started with other settings; a worker is lost.
        CheckpointError: a checkpoint cannot be read or written.
        SystemExit: a signal came; its code is 128 + the signal's number.
    """
    if not 1 <= epochs <= steps:
        raise ValueError(f"epochs must be from 1 to steps. Received: epochs={epochs}, steps={steps}")
    run_dir, settings = pathlib.Path(run_dir), settings or {}
    strategy = strategy or tf.distribute.get_strategy()
    worker, workers = cluster.worker_of(strategy)
    path, record = run_dir / "checkpoint.keras", Record(run_dir)
    exists = checkpoint_exists(path)
    checkpoint = Checkpoint(path, checkpoint_minutes)
    if exists and not resume and not overwrite:
        raise RunError(
            f"{run_dir} has the checkpoint of a run. --resume goes on with it, --overwrite begins anew in its place; "
            "or name another --run_dir."
        )
    if resume and not exists:
        raise RunError(f"There is no checkpoint in {run_dir} to resume from. Leave --resume out to begin.")
    before = record.check(steps, settings) if resume else None
    if workers > 1:
        cluster.total(strategy, 0)  # nothing may be written before all have looked
    with cluster.workers_watched(strategy), strategy.scope():
        model = load_checkpoint(path) if resume else make_model()
    done = steps_taken(model.optimizer)
    if workers > 1 and cluster.total(strategy, done) != done * strategy.num_replicas_in_sync:
        raise RunError(f"The workers do not read the same checkpoint: {run_dir} must be a folder that all of them see.")
    chief = worker == 0
    say = print if chief else _say_nothing
    if resume:
        say(f"resuming {path} after step {done}")
        if before is not None and steps > before:
            if schedule is None:
                raise RunError(
                    f"The run in {run_dir} was started with {before} steps, and nothing says how it goes on."
                )
            say(f"{before:,} steps are now {steps:,}: the learning rate goes on along the schedule of the longer run")
        if schedule is not None:  # also where the steps were raised before, and no checkpoint came of it
            getattr(model.optimizer, "inner_optimizer", model.optimizer).set_schedule(schedule)
    elif chief and exists:  # no later --resume may take these for this run's
        if path.exists():
            path.replace(path.with_name("checkpoint.overwritten.keras"))
        path.with_name("checkpoint.previous.keras").unlink(missing_ok=True)
    if chief:
        record.write(steps, settings)
    say(f"{model.count_params():,} parameters, {steps:,} steps{_on(strategy, workers)}")
    stop = StopOnSignal()
    # All workers look at the same numbers at the same steps, since some of them are sums over all; one writes.
    shared = [TrainingLog(run_dir / "log" if chief else None), StopOnNonFinite(), MovingAverage(), stop]
    if chief:
        shared[2:2] = [checkpoint]
        shared[-1:-1] = callbacks
    first = [FirstStep()] if chief else []
    fits = _fits(done, steps, epochs)
    with stop, cluster.workers_watched(strategy), _written(checkpoint):
        for index, (epoch, count, length) in enumerate(fits):
            with _weights_kept(model.optimizer) if index + 1 < len(fits) else contextlib.nullcontext():
                model.fit(
                    cluster.distributed(functools.partial(train, done), strategy),
                    initial_epoch=epoch,
                    epochs=epoch + count,
                    steps_per_epoch=length,
                    validation_data=cluster.distributed(validation, strategy),
                    callbacks=[*first, *shared],
                    verbose="auto" if chief else 0,
                )
            done, first = done + count * length, []
            received = stop.agree(model)
            if received:
                taken = steps_taken(model.optimizer)
                say(f"stopped by {received.name} after step {taken}; --resume goes on from {path}", flush=True)
                raise SystemExit(128 + received)
    if not fits:
        use_average(model)
    return model


def _on(strategy, workers):
    """Where a run goes, for a line of its own."""
    count = strategy.num_replicas_in_sync
    if count == 1:
        return ""
    return f", on {count} devices" + (f" of {workers} machines" if workers > 1 else "")


def _say_nothing(*_, **__):
    """For workers beside the first."""


def _fits(done, steps, epochs):
    """What is left of a run as calls of `fit`, all of whose epochs have one length: (first epoch, epochs, steps).

    An epoch is `steps // epochs` steps, and the last has what remains too. A run that was stopped within an epoch
    finishes that first.
    """
    length, fits = steps // epochs, []
    for epoch in range(epochs):
        end = steps if epoch + 1 == epochs else (epoch + 1) * length
        left = end - max(done, epoch * length)
        if left <= 0:
            continue
        if fits and fits[-1][2] == left:
            fits[-1] = (fits[-1][0], fits[-1][1] + 1, left)
        else:
            fits.append((epoch, 1, left))
    return fits


@contextlib.contextmanager
def _written(checkpoint):
    """Sees to it that what was taken is on disk, whatever ends a `fit`."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(CheckpointError):
            checkpoint.wait()
        raise


@contextlib.contextmanager
def _weights_kept(optimizer):
    """Keeps a `fit` that is not the last from making the weights their moving average, as Keras does at its end."""
    optimizer.finalize_variable_values = lambda variables: None
    try:
        yield
    finally:
        del optimizer.finalize_variable_values
