"""Grids of samples for TensorBoard and files."""

import keras
import numpy as np
import tensorflow as tf

from stf.callbacks.drawing import grid
from stf.training import steps_taken


class Samples(keras.callbacks.Callback):
    """Draws samples of the model and shows them as a grid of images.

    Args:
        log_dir: TensorBoard's folder.
        image_shape: (rows, columns, channels) of a sequence.
        count: samples of a grid.
        every: epochs between two grids; 0 draws at the end of training alone.
        temperature, seed: of the draws.
    """

    def __init__(self, log_dir, image_shape=(32, 32, 3), count=8, every=0, temperature=1.0, seed=0):
        super().__init__()
        self.log_dir = str(log_dir)
        self.image_shape = tuple(image_shape)
        self.count = count
        self.every = every
        self.temperature = temperature
        self.seed = seed

    def images(self, prefix=None, verbose=0):
        """Samples `[count, rows, columns, channels]`, uint8; `prefix` as in `SparseTransformer.generate`."""
        tokens = self.model.generate(
            self.count,
            self.temperature,
            prefix=prefix,
            length=int(np.prod(self.image_shape)),
            seed=self.seed,
            verbose=verbose,
        )
        return tokens.astype(np.uint8).reshape(-1, *self.image_shape)

    def write(self, name, images, columns=None):
        """Writes images `[count, rows, columns, channels]` to the log, as a grid of so many columns.

        All pictures share the group `images`, since TensorBoard unfolds only the first groups of its page.
        """
        writer = tf.summary.create_file_writer(self.log_dir)
        with writer.as_default(step=steps_taken(self.model.optimizer)):
            tf.summary.image(f"images/{name}", grid(images, columns)[None])
        writer.close()

    def on_epoch_end(self, epoch, logs=None):
        """Draws a grid every so many epochs."""
        if self.every and (epoch + 1) % self.every == 0:
            self.write("samples", self.images())
