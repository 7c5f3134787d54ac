"""Checkpoints that a killed run goes on from."""

import contextlib
import os
import pathlib
import shutil
import time

import keras


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read; one line that names the path, the cause and what to do."""


class Checkpoint(keras.callbacks.Callback):
    """Saves model, optimizer and seeds to one file after each epoch, and by time; the last good one is always there.

    The file is written under another name and then renamed, so that a run killed at any moment leaves a whole one; the
    one before stays as `NAME.previous.keras`. What has been done is in it: `stf.training.steps_taken` says how many
    batches.

    Args:
        path: a `.keras` file.
        minutes: a checkpoint is written after a step when so many have passed since the last; None: after epochs alone.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """

    def __init__(self, path, minutes=None):
        super().__init__()
        self.path = pathlib.Path(path)
        if self.path.suffix != ".keras":
            raise ValueError(f"path must end in .keras. Received: path={path}")
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes must be above 0, or None. Received: minutes={minutes!r}")
        self.minutes = minutes
        self._saved = time.monotonic()

    def save(self):
        """Writes the checkpoint now."""
        fresh = self.path.with_name(f"{self.path.stem}.new.keras")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.model.save(fresh)
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
        self._saved = time.monotonic()

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

    def on_train_begin(self, logs=None):
        """Time counts from here."""
        self._saved = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        """Saves where it is time."""
        if self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes:
            self.save()

    def on_epoch_end(self, epoch, logs=None):
        """Saves."""
        self.save()


def _previous(path):
    """Where the checkpoint before that of a path lies."""
    return path.with_name(f"{path.stem}.previous.keras")


def load_checkpoint(path):
    """The model of a checkpoint; of the one before it, where the last cannot be read.

    Args:
        path: `.../checkpoint.keras`.

    Raises:
        CheckpointError: neither can be read.
    """
    path = pathlib.Path(path)
    causes = []
    for candidate in (path, _previous(path)):
        if not candidate.exists():
            continue
        try:
            model = keras.saving.load_model(candidate)
        except (
            Exception
        ) as error:  # whatever a file may hold: Keras raises ValueError, KeyError, OSError, zipfile's own
            causes.append(f"{candidate} is no whole checkpoint ({_first_line(error)})")
            continue
        if causes:
            print(f"{causes[0]}: going on from the one before it, {candidate}")
        return model
    raise CheckpointError(
        f"{'; '.join(causes) or f'{path} is not there'}. Begin anew with --overwrite, or name another --run_dir."
    )


def _first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
