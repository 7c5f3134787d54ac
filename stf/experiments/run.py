"""A run that leaves a checkpoint and a log, is stopped by a signal without loss, and goes on from where it was."""

import contextlib
import pathlib

from stf.callbacks import (
    Checkpoint,
    FirstStep,
    MovingAverage,
    StopOnNonFinite,
    StopOnSignal,
    TrainingLog,
    load_checkpoint,
)
from stf.experiments.errors import RunError
from stf.experiments.record import Record
from stf.training.optimizer import steps_taken, use_average


def run(
    make_model,
    train,
    validation,
    run_dir,
    steps,
    epochs,
    resume=False,
    callbacks=(),
    overwrite=False,
    settings=None,
    schedule=None,
    checkpoint_minutes=10.0,
):
    """Trains a model up to a step; each of `epochs` parts ends with validation and a checkpoint.

    SIGTERM and Ctrl-C end it after the step in hand, with a checkpoint.

    Args:
        make_model: function without arguments that returns a new, compiled model.
        train: function of the batches to leave out at the start that returns an endless `tf.data.Dataset`.
        validation: finite dataset.
        run_dir: folder of `checkpoint.keras`, of the one before it, of `run.json` and of TensorBoard's `log`.
        steps: of the whole run.
        epochs: parts of the run, of `steps // epochs` steps; the last has what remains too.
        resume: go on from the checkpoint: the model, its optimizer, its seeds and its place in the data are as they
            were.
        callbacks: more callbacks.
        overwrite: begin anew where the folder has a checkpoint.
        settings: what the run is started with, as far as it must be the same when it goes on: names and values that
            JSON has. Kept in `run.json`.
        schedule: the learning rate of `steps` steps, for a run that goes on with more than it was started with.
        checkpoint_minutes: a checkpoint is also written when so many minutes have passed since the last; None: never.

    Returns:
        The trained model; where the optimizer keeps a moving average of the weights, with that.

    Raises:
        ValueError: there are fewer steps than epochs.
        RunError: the folder has a checkpoint and neither `resume` nor `overwrite` is set, or has none to resume from;
            the run was started with other settings.
        CheckpointError: a checkpoint cannot be read or written.
        SystemExit: a signal came; its code is 128 + the signal's number.
    """
    if not 1 <= epochs <= steps:
        raise ValueError(f"epochs must be from 1 to steps. Received: epochs={epochs}, steps={steps}")
    run_dir, settings = pathlib.Path(run_dir), settings or {}
    path, record = run_dir / "checkpoint.keras", Record(run_dir)
    exists = any(run_dir.glob("checkpoint*.keras"))
    if exists and not resume and not overwrite:
        raise RunError(
            f"{run_dir} has the checkpoint of a run. --resume goes on with it, --overwrite begins anew in its place; "
            "or name another --run_dir."
        )
    if resume and not exists:
        raise RunError(f"There is no checkpoint in {run_dir} to resume from. Leave --resume out to begin.")
    if resume:
        before = record.check(steps, settings)
        model = load_checkpoint(path)
        print(f"resuming {path} after step {steps_taken(model.optimizer)}")
        if before is not None and steps > before:
            if schedule is None:
                raise RunError(
                    f"The run in {run_dir} was started with {before} steps, and nothing says how it goes on."
                )
            print(f"{before:,} steps are now {steps:,}: the learning rate goes on along the schedule of the longer run")
        if schedule is not None:  # also where the steps were raised before, and no checkpoint came of it
            getattr(model.optimizer, "inner_optimizer", model.optimizer).set_schedule(schedule)
    else:
        model = make_model()
        for old in run_dir.glob("checkpoint*.keras"):  # no later --resume may take them for this run's
            old.unlink()
    record.write(steps, settings)
    print(f"{model.count_params():,} parameters, {steps:,} steps")
    stop = StopOnSignal()
    first = [FirstStep()]
    shared = [
        TrainingLog(run_dir / "log"),
        Checkpoint(path, checkpoint_minutes),
        MovingAverage(),
        StopOnNonFinite(),
        *callbacks,
        stop,
    ]
    done = steps_taken(model.optimizer)
    fits = _fits(done, steps, epochs)
    for index, (epoch, count, length) in enumerate(fits):
        with _weights_kept(model.optimizer) if index + 1 < len(fits) else contextlib.nullcontext():
            model.fit(
                train(done),
                initial_epoch=epoch,
                epochs=epoch + count,
                steps_per_epoch=length,
                validation_data=validation,
                callbacks=[*first, *shared],
            )
        done, first = done + count * length, []
        if stop.received:
            taken = steps_taken(model.optimizer)
            print(f"stopped by {stop.received.name} after step {taken}; --resume goes on from {path}", flush=True)
            raise SystemExit(128 + stop.received)
    if not fits:
        use_average(model)
    return model


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
def _weights_kept(optimizer):
    """Keeps a `fit` that is not the last from making the weights their moving average, as Keras does at its end."""
    optimizer.finalize_variable_values = lambda variables: None
    try:
        yield
    finally:
        del optimizer.finalize_variable_values
