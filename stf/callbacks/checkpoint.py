"""Checkpoints that a killed run goes on from."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import time
import zipfile

import keras
import numpy as np
import tensorflow as tf

from stf.models import count_parameters
from stf.typing import Logs, PathLike

MOST_CONFIG = 2**24  # bytes


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read; one line that names the path, the cause and what to do."""


class Checkpoint(keras.callbacks.Callback):
    """Saves model, optimizer and seeds to one file after each epoch, and by time; the last good one is always there.

    Training waits for a copy of the variables on their own device; a thread writes that, while training goes on. The
    file is written under another name and then renamed, so that a run killed at any moment leaves a whole one; the one
    before stays as `NAME.previous.keras`. What has been done is in it: `stf.training.steps_taken` says how many
    batches. At the end of `fit` the last one is on disk, and a line says what all of them cost.

    Args:
        path: a `.keras` file.
        minutes: a checkpoint is written after a step when so many have passed since the last; None: after epochs alone.
        verbose: 1 prints that line.

    Raises:
        CheckpointError: one cannot be written, at the latest with the next or at the end; what was there before is
            untouched.
    """

    def __init__(self, path: PathLike, minutes: float | None = None, verbose: int = 1) -> None:
        super().__init__()
        self.path = pathlib.Path(path)
        if self.path.suffix != ".keras":
            raise ValueError(f"path must end in .keras. Received: path={path}")
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes must be above 0, or None. Received: minutes={minutes!r}")
        self.minutes = minutes
        self.verbose = verbose
        self._saved = time.monotonic()
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None
        self._twin: keras.Model | None = None
        self._waited: list[float] = []  # seconds of training that each took
        self._wrote: list[float] = []  # seconds of the thread

    def save(self) -> None:
        """Takes the state of now, and has it written."""
        self.wait()
        begin = time.monotonic()
        values = [_copied(variable) for variable in _state(self.model)]
        self._writing = self._writer.submit(self._write, values)
        self._saved = time.monotonic()
        self._waited.append(self._saved - begin)

    def wait(self) -> None:
        """Until what was taken is on disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, values):
        begin = time.monotonic()
        fresh = self.path.with_name(f"{self.path.stem}.new.keras")
        try:
            if self._twin is None:
                self._twin = _twin(self.model)
            for variable, value in zip(_state(self._twin), values, strict=True):
                variable.assign(value.numpy())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._twin.save(fresh)
            with open(fresh, "rb") as file:
                os.fsync(file.fileno())
            self._keep_previous()
            fresh.replace(self.path)
        except (OSError, RuntimeError) as error:  # h5py says some of a disk's errors as RuntimeError
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)  # or a full disk would stay full
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{self.path} could not be written: {cause}. "
                "What was there before is untouched; --resume goes on from it once there is room."
            ) from error
        self._wrote.append(time.monotonic() - begin)

    def _keep_previous(self):
        """Gives the last checkpoint its second name, before the first is another's."""
        if not self.path.exists():
            return
        link = self.path.with_name(f"{self.path.stem}.link.keras")
        link.unlink(missing_ok=True)
        try:
            os.link(self.path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(self.path, link)
        link.replace(_previous(self.path))

    def on_train_begin(self, logs: Logs = None) -> None:
        """Time counts from here."""
        self._saved = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Saves where it is time."""
        if self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes:
            self.save()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Saves."""
        self.save()

    def on_train_end(self, logs: Logs = None) -> None:
        """Waits for the last one."""
        self.wait()
        if self.verbose and self._wrote:
            print(
                f"checkpoints: {len(self._wrote)} written to {self.path}; of each, training waited "
                f"{np.mean(self._waited):.3f} s, and a thread wrote for {np.mean(self._wrote):.1f} s",
                flush=True,
            )
        self._waited, self._wrote = [], []


def _state(model):
    """All variables that a checkpoint holds, in an order that a model of the same configuration shares."""
    metrics = {id(variable) for metric in model.metrics for variable in metric.variables}
    variables = [*model.variables, *(model.optimizer.variables if model.optimizer else [])]
    return [variable for variable in variables if id(variable) not in metrics]


def _copied(variable):
    """A variable's value of now, whatever becomes of the variable, on the device that it lies on."""
    value = tf.convert_to_tensor(getattr(variable.value, "values", [variable.value])[0])  # of replicas, which are alike
    if value.dtype.is_floating and value.shape.num_elements() > 1024:
        return tf.raw_ops.DeepCopy(x=value)
    return tf.constant(value.numpy())


def _twin(model):
    """A model of the same configuration on the host, compiled alike, for the thread to save."""
    with tf.device("CPU:0"):
        twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
        if twin.optimizer is not None and not twin.optimizer.built:
            twin.optimizer.build(twin.trainable_variables)
    return twin


def exists(path):
    """Whether there is a checkpoint, or one before it."""
    return pathlib.Path(path).exists() or _previous(pathlib.Path(path)).exists()


def _previous(path):
    """Where the checkpoint before that of a path lies."""
    return path.with_name(f"{path.stem}.previous.keras")


def load_checkpoint(path: PathLike) -> keras.Model:
    """The model of a checkpoint; of the one before it, where the last is broken, which is then moved aside.

    Args:
        path: `.../checkpoint.keras`.

    Raises:
        CheckpointError: neither is whole, or the disk does not give one.
    """
    path = pathlib.Path(path)
    causes = []
    for candidate in (path, _previous(path)):
        if not candidate.exists():
            continue
        try:
            _check_sizes(candidate)
            model = keras.saving.load_model(candidate)
        except (tf.errors.OpError, MemoryError):  # which say nothing of the file
            raise
        except Exception as error:  # whatever a file may hold: ValueError, KeyError, OSError, zipfile's own
            if isinstance(error, OSError) and error.errno:
                raise CheckpointError(f"{candidate} could not be read: {_first_line(error)}") from error
            causes.append(f"{candidate} is no whole checkpoint ({_first_line(error)})")
            continue
        if causes:
            print(f"{causes[0]}: going on from the one before it, {candidate}")
            with contextlib.suppress(OSError):  # so that it never takes the place of the one before it
                path.replace(path.with_name(f"{path.stem}.broken.keras"))
        return model
    raise CheckpointError(
        f"{'; '.join(causes) or f'{path} is not there'}. Begin anew with --overwrite, or name another --run_dir."
    )


def _check_sizes(path):
    """Refuses a file whose model and weights are not of one size, before either is made: minutes, and gigabytes."""
    with zipfile.ZipFile(path) as file:
        described, weights = file.getinfo("config.json").file_size, file.getinfo("model.weights.h5").file_size
        if described > MOST_CONFIG:
            raise ValueError(f"its config.json has {described:,} bytes")
        config = json.loads(file.read("config.json"))
    if config.get("class_name") != "SparseTransformer":
        return
    parameters = count_parameters(config["config"], config["config"]["vocab_size"])
    # From halves alone to float64 with momentum, velocity, average and accumulator; and HDF5's own.
    if not 2 * parameters <= weights <= 5 * 8 * parameters + MOST_CONFIG:
        raise ValueError(f"its config describes {parameters:,} parameters, its weights have {weights:,} bytes")


def _first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
