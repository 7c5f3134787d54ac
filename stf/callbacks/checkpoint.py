"""Checkpoints that a killed run goes on from."""

import os
import pathlib

import keras


class Checkpoint(keras.callbacks.Callback):
    """Saves model, optimizer and seeds to one file after each epoch; the last good one is always there.

    The file is written under another name and then renamed, so that a run killed at any moment leaves a whole
    one. What has been done is in it: `stf.training.steps_taken` says how many batches.

    Args:
        path: a `.keras` file.
    """

    def __init__(self, path):
        super().__init__()
        self.path = pathlib.Path(path)
        if self.path.suffix != ".keras":
            raise ValueError(f"path must end in .keras. Received: path={path}")

    def save(self):
        """Writes the checkpoint now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{self.path.stem}.new.keras")
        self.model.save(fresh)
        with open(fresh, "rb") as file:
            os.fsync(file.fileno())
        fresh.replace(self.path)

    def on_epoch_end(self, epoch, logs=None):
        """Saves."""
        self.save()
