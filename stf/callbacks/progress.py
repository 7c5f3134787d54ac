"""Scalars of a run for TensorBoard, and word of what a run is waiting for."""

import time
from typing import Any

import keras
import tensorflow as tf

from stf.extras import needed
from stf.training import BitsPerDim, steps_taken
from stf.typing import Logs, PathLike


class TrainingLog(keras.callbacks.Callback):
    """Writes loss, bits per dim, learning rate, gradient norm and tokens per second, and validation after each epoch.

    Loss and bits per dim of an entry are those of the batches since the last one, where Keras shows the mean over the
    epoch so far; metrics are taken to be means over batches of one size. It looks when the next batch begins, and only
    where an entry is due: steps are dispatched ahead of the device in between. The step of an entry is the number of
    batches that the optimizer has seen.

    Args:
        log_dir: TensorBoard's folder; None writes nothing (for a worker that reads what others write).
        every: steps between two entries.
    """

    def __init__(self, log_dir: PathLike | None, every: int = 10) -> None:
        super().__init__()
        if log_dir is not None:
            needed("tensorboard")  # without it TensorFlow writes no scalars
        self.log_dir = None if log_dir is None else str(log_dir)
        self.every = every
        self._writer: Any = None
        self._before = self._written = 0  # batches before this epoch; those at the last entry
        # Of the epoch at the last entry: batches, and the metrics' means over them.
        self._means: tuple[int, dict[str, float]] = (0, {})
        # The time of the last entry, and the epoch's tokens by then; the same at the end of the epoch's training,
        # before validation counts anew.
        self._clock: tuple[float, float] | None = None
        self._ended: tuple[float, float] | None = None

    def on_train_begin(self, logs: Logs = None) -> None:
        """Opens the log."""
        write = self.log_dir is not None
        self._writer = tf.summary.create_file_writer(self.log_dir) if write else tf.summary.create_noop_writer()
        self._written = steps_taken(self.model.optimizer)
        self._clock = None  # until the first entry: the first step is compiled

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Notes where the epoch begins."""
        self._before = steps_taken(self.model.optimizer)
        self._means, self._ended = (0, {}), None
        if self._clock is not None:
            self._clock = (time.perf_counter(), 0.0)

    def on_test_begin(self, logs: Logs = None) -> None:
        """Notes when the epoch's training ended: validation takes time, and its tokens are others."""
        if self._writer is not None:
            self._ended = (time.perf_counter(), self._tokens())

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Writes what the batches before have given, where they are as many as an entry takes."""
        step = self._before + batch
        if step // self.every > self._written // self.every:
            self._write_training(step, self.model.get_metrics_result())

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Writes what validation gave."""
        logs = logs or {}
        step = steps_taken(self.model.optimizer)
        if step // self.every > self._written // self.every:
            self._write_training(step, {name: value for name, value in logs.items() if not name.startswith("val_")})
        if not getattr(self.model, "stop_evaluating", False):  # a validation that was cut short is none
            self._write(step, {f"validation/{name[4:]}": logs[name] for name in logs if name.startswith("val_")})
        self._writer.flush()

    def on_train_end(self, logs: Logs = None) -> None:
        """Closes the log."""
        self._writer.close()
        self._writer = None

    def _write_training(self, step, metrics):
        batches, (before, means) = step - self._before, self._means
        metrics = {name: float(tf.convert_to_tensor(value)) for name, value in metrics.items()}
        values = {
            f"train/{name}": (mean * batches - means.get(name, 0.0) * before) / (batches - before)
            for name, mean in metrics.items()
        }
        self._means = (batches, metrics)
        now, tokens = self._ended or (time.perf_counter(), self._tokens())
        if self._clock is not None and tokens is not None:
            values["train/tokens_per_second"] = (tokens - self._clock[1]) / (now - self._clock[0])
        self._clock = (now, tokens or 0.0)
        values["train/learning_rate"] = self.model.optimizer.learning_rate
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        for name, attribute in (("gradient_norm", "gradient_norm"), ("skipped_steps", "skipped")):
            if hasattr(optimizer, attribute):
                values[f"train/{name}"] = getattr(optimizer, attribute)
        self._write(step, values)
        self._written = step

    def _tokens(self):
        """How many tokens the epoch's batches had, as a `BitsPerDim` has counted them; None where there is none."""
        for metric in self.model.metrics:
            for each in (metric, *getattr(metric, "metrics", ())):
                if isinstance(each, BitsPerDim):
                    return float(each.tokens)
        return None

    def _write(self, step, values):
        with self._writer.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, float(tf.convert_to_tensor(value)))


class FirstStep(keras.callbacks.Callback):
    """Says before the first step what it waits for, and after it how long that took."""

    def __init__(self) -> None:
        super().__init__()
        self._begin: float | None = None
        self._told = False

    def on_train_begin(self, logs: Logs = None) -> None:
        """Forgets an earlier run."""
        self._begin, self._told = None, False

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Before the first and before the second batch."""
        if self._begin is None:
            self._begin = time.perf_counter()
            how = "compiled by XLA" if self.model.jit_compile else "traced"
            print(f"waiting for the first step, which is {how} once for each shape of a batch ...", flush=True)
        elif not self._told:
            steps_taken(self.model.optimizer)  # waits for the device
            self._told = True
            print(f"the first step took {time.perf_counter() - self._begin:.1f} s", flush=True)
