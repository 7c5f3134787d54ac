"""The end of a run that no longer computes numbers."""

import keras
import numpy as np
import tensorflow as tf

from stf.models import SparseTransformer
from stf.typing import Logs, TensorLike


def first_non_finite(model: SparseTransformer, tokens: TensorLike) -> str | None:
    """The name of the first part of a `SparseTransformer` whose output for `tokens` is not finite; None where all is.

    Args:
        model: a built `SparseTransformer`.
        tokens: integers `[batch, position]`.
    """

    def broken(x):
        return not bool(tf.reduce_all(tf.math.is_finite(tf.cast(x, tf.float32))))

    x = model.embedding(tf.convert_to_tensor(tokens))
    if broken(x):
        return model.embedding.name
    for index in range(model.num_blocks):
        block = model.stack.block(index)
        branch = block.combine(block.attend(block.query_key_value(x))[0])
        if broken(branch):
            return f"block_{index}.attention"
        x = x + branch
        branch = block.feed_forward_output(block.hidden(x))
        if broken(branch):
            return f"block_{index}.feed_forward"
        x = x + branch
        if broken(x):
            return f"block_{index}"
    for layer in (model.final_norm, model.logits):
        x = layer(x)
        if broken(x):
            return layer.name
    return None


class StopOnNonFinite(keras.callbacks.Callback):
    """Ends training after so many steps in a row whose gradients were not finite; the run goes on after fewer.

    For optimizers that count such steps (`stf.training.AdamW`); with others it does nothing.

    Args:
        limit: steps in a row. At the start, mixed_float16 may skip a few until its scale fits.
        every: steps between two looks, since each waits for the device.

    Raises:
        FloatingPointError: names the part of the model whose output broke first, where it breaks still.
    """

    def __init__(self, limit: int = 100, every: int = 50) -> None:
        super().__init__()
        if limit < 1 or every < 1:
            raise ValueError(f"limit and every must be at least 1. Received: limit={limit}, every={every}")
        self.limit = limit
        self.every = every
        self._batches = 0

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Looks every so many steps, at those before this one."""
        self._batches += 1
        if self._batches > 1 and (self._batches - 1) % self.every == 0:
            self._look()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Looks at the epoch's last steps."""
        self._look()

    def _look(self):
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if not hasattr(optimizer, "skipped_in_a_row"):
            return
        in_a_row = int(tf.convert_to_tensor(optimizer.skipped_in_a_row))
        if in_a_row < self.limit:
            return
        where = ""
        if isinstance(self.model, SparseTransformer):
            name = first_non_finite(self.model, np.zeros([1, self.model.length], np.int32))
            where = f" The output of {name} is the first that is not finite." if name else " Outputs are finite."
        raise FloatingPointError(
            f"The gradients of {in_a_row} steps in a row were not finite (limit={self.limit}); training ends.{where} "
            "A new run with a lower rate, or with bfloat16 for float16, may help; the last checkpoint is untouched."
        )
