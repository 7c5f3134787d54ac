"""Samples for TensorBoard and files: grids of images, text, sound."""

from collections.abc import Sequence

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from stf.callbacks.drawing import grid
from stf.data.audio import RATE, decode
from stf.extras import needed
from stf.training import steps_taken
from stf.typing import Logs, PathLike, TensorLike


class Samples(keras.callbacks.Callback):
    """Draws samples of the model and shows them as a grid of images.

    Args:
        log_dir: TensorBoard's folder.
        image_shape: (rows, columns, channels) of a sequence.
        count: samples of a grid.
        every: epochs between two grids; 0 draws at the end of training alone.
        temperature, seed: of the draws.
    """

    def __init__(
        self,
        log_dir: PathLike,
        image_shape: Sequence[int] = (32, 32, 3),
        count: int = 8,
        every: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        needed("tensorboard")  # without it TensorFlow writes no pictures
        self.log_dir = str(log_dir)
        self.image_shape = tuple(image_shape)
        self.count = count
        self.every = every
        self.temperature = temperature
        self.seed = seed

    def images(self, prefix: TensorLike | None = None, verbose: int = 0) -> npt.NDArray[np.uint8]:
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

    def caption(self, of: str = "samples") -> str:
        """What a grid shows, in words."""
        drawn = f"temperature {self.temperature:g}, seed {self.seed}"
        return f"{of}; step {steps_taken(self.model.optimizer):,}, {drawn}"

    def write(self, name: str, images: npt.ArrayLike, columns: int | None = None, caption: str | None = None) -> None:
        """Writes images `[count, rows, columns, channels]` to the log, as a grid of so many columns under a caption.

        All pictures share the group `images`, since TensorBoard unfolds only the first groups of its page.
        """
        writer = tf.summary.create_file_writer(self.log_dir)
        with writer.as_default(step=steps_taken(self.model.optimizer)):
            tf.summary.image(f"images/{name}", grid(images, columns, caption=caption)[None])
        writer.close()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Draws a grid every so many epochs."""
        if self.every and (epoch + 1) % self.every == 0:
            self.write("samples", self.images(), caption=self.caption())


def log_text(log_dir: PathLike, name: str, tokens: npt.ArrayLike, step: int) -> None:
    """Writes bytes `[position]` to TensorBoard's log as a text, as they stand; what is no UTF-8 is replaced."""
    text = np.asarray(tokens).astype(np.uint8).tobytes().decode("utf-8", "replace")
    writer = tf.summary.create_file_writer(str(log_dir))
    with writer.as_default(step=step):
        tf.summary.text(name, "\n".join(f"    {line}" for line in text.split("\n")))  # Markdown's code
    writer.close()


def log_audio(log_dir: PathLike, name: str, tokens: npt.ArrayLike, step: int, rate: int = RATE) -> None:
    """Writes µ-law bytes `[position]` to TensorBoard's log as a sound of so many samples a second."""
    writer = tf.summary.create_file_writer(str(log_dir))
    with writer.as_default(step=step):
        tf.summary.audio(name, decode(tokens).astype(np.float32)[None, :, None], rate)
    writer.close()
