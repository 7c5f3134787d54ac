"""What the examples share: a run that leaves a checkpoint and a log, and goes on from them."""

import pathlib

import keras

from stf.training.optimizer import steps_taken


def run(make_model, train, validation, run_dir, steps, epochs, resume=False, callbacks=()):
    """Trains a model up to a step; each of `epochs` parts ends with validation and a checkpoint.

    Args:
        make_model: function without arguments that returns a new, compiled model.
        train: function of the batches to leave out at the start that returns an endless `tf.data.Dataset`.
        validation: finite dataset.
        run_dir: folder of `checkpoint.keras` and TensorBoard's `log`.
        steps: of the whole run.
        epochs: parts of the run, all of `steps // epochs` steps.
        resume: go on from the checkpoint where there is one: the model, its optimizer, its seeds and its place in the
            data are as they were.
        callbacks: more callbacks.

    Returns:
        The trained model; where the optimizer keeps a moving average of the weights, with that.

    Raises:
        ValueError: there are fewer steps than epochs.
    """
    from stf.callbacks import Checkpoint, FirstStep, MovingAverage, StopOnNonFinite, TrainingLog

    if not 1 <= epochs <= steps:
        raise ValueError(f"epochs must be from 1 to steps. Received: epochs={epochs}, steps={steps}")
    run_dir = pathlib.Path(run_dir)
    checkpoint = run_dir / "checkpoint.keras"
    if resume and checkpoint.exists():
        model = keras.saving.load_model(checkpoint)
        print(f"resuming {checkpoint} after step {steps_taken(model.optimizer)}")
    else:
        model = make_model()
    print(f"{model.count_params():,} parameters, {steps:,} steps")
    done, steps_per_epoch = steps_taken(model.optimizer), steps // epochs
    model.fit(
        train(done),
        initial_epoch=done // steps_per_epoch,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        validation_data=validation,
        callbacks=[
            FirstStep(),
            TrainingLog(run_dir / "log"),
            Checkpoint(checkpoint),
            MovingAverage(),
            StopOnNonFinite(),
            *callbacks,
        ],
    )
    return model
