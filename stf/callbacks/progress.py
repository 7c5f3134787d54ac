"""Scalars of a run for TensorBoard."""

import keras
import tensorflow as tf


class TrainingLog(keras.callbacks.Callback):
    """Writes bits per dim, learning rate and gradient norm during training, and validation after each epoch.

    Args:
        log_dir: TensorBoard's folder.
        every: steps between two entries.
    """

    def __init__(self, log_dir, every=10):
        super().__init__()
        self.log_dir = str(log_dir)
        self.every = every
        self._writer = None

    def on_train_begin(self, logs=None):
        """Opens the log."""
        self._writer = tf.summary.create_file_writer(self.log_dir)

    def _write(self, values):
        step = int(self.model.optimizer.iterations)
        with self._writer.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, float(value))

    def on_train_batch_end(self, batch, logs=None):
        """Writes every so many steps."""
        if int(self.model.optimizer.iterations) % self.every:
            return
        values = {f"train/{name}": value for name, value in (logs or {}).items()}
        values["train/learning_rate"] = self.model.optimizer.learning_rate
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if hasattr(optimizer, "gradient_norm"):
            values["train/gradient_norm"] = optimizer.gradient_norm
        if hasattr(self.model.optimizer, "skipped"):
            values["train/skipped_steps"] = self.model.optimizer.skipped
        self._write(values)

    def on_epoch_end(self, epoch, logs=None):
        """Writes what validation gave."""
        logs = logs or {}
        self._write({f"validation/{name[4:]}": value for name, value in logs.items() if name.startswith("val_")})
        self._writer.flush()

    def on_train_end(self, logs=None):
        """Closes the log."""
        self._writer.close()
