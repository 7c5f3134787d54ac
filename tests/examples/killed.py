"""Runs an example, the first argument, with the flags behind it, and kills it a step after its first checkpoint."""

import importlib
import os
import runpy
import signal
import sys

import stf


class KilledCheckpoint(stf.callbacks.Checkpoint):
    """Kills the process once a checkpoint is on disk and a step has been taken since."""

    def on_train_batch_end(self, batch, logs=None):
        self.wait()
        if self.path.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_train_batch_end(batch, logs)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    importlib.import_module("stf.experiments.run").Checkpoint = KilledCheckpoint
    runpy.run_path(sys.argv[0], run_name="__main__")
