"""Evaluation in which every token counts once, whatever the batches."""

import math
import time
from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from stf.layers.validation import positive
from stf.typing import TensorLike

if TYPE_CHECKING:
    from stf.models import SparseTransformer


class Evaluation(NamedTuple):
    """What `evaluate` found.

    bits: mean bits for each counted token: bits per dim of images, bits per byte of text.
    tokens: how many counted.
    losses: float32 `[tokens]`, nats of each, in the data's order.
    seconds: that it took.
    """

    bits: float
    tokens: int
    losses: np.ndarray
    seconds: float


def in_float32(model: keras.Model) -> keras.Model:
    """The model with its weights, computing in float32, whatever dtype policy it was trained under.

    The same model where it does so already. Weights are float32 under every policy.
    """
    if model.compute_dtype == "float32":
        return model
    config = model.get_config() | {"dtype": "float32"}
    exact = type(model).from_config(config)
    exact.set_weights(model.get_weights())
    return exact


def score(
    model: "SparseTransformer", tokens: TensorLike, batch_size: int = 16, verbose: int = 0
) -> npt.NDArray[np.float32]:
    """The log-likelihood of each token given those before it.

    Args:
        model: gives logits `[batch, position, vocab_size]` of tokens `[batch, position]`.
        tokens: integers `[sequence, position]`, or `[position]`.
        batch_size: sequences that go through the model at a time.
        verbose: 1 shows a progress bar.

    Returns:
        float32 NumPy array like `tokens`, in nats; its sum over positions is the sequence's log-likelihood.

    Raises:
        ValueError: tokens that are none of the model's.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be integers [sequence, position] or [position]. "
            f"Received: tokens of shape {tokens.shape} and dtype {tokens.dtype}"
        )
    vocab_size = getattr(model, "vocab_size", np.inf)
    for token in tokens[(tokens < 0) | (tokens >= vocab_size)].flat[:1]:
        raise ValueError(f"tokens must be from 0 to {vocab_size - 1}. Received: token {token}")
    rows = np.atleast_2d(tokens).astype(np.int32)
    batches = range(0, len(rows), positive("batch_size", batch_size))
    found = [np.zeros((0, rows.shape[1]), np.float32)]
    losses_of = _losses_of(model)
    bar = keras.utils.Progbar(len(batches), verbose=int(bool(verbose)), unit_name="batch")
    for begin in batches:
        batch = rows[begin : begin + batch_size]
        found.append(-losses_of(batch, batch).numpy())
        bar.add(1)
    return np.concatenate(found).reshape(tokens.shape)


def progress_with_bits(dataset, verbose):
    """A bar over a data set's batches that shows the last value of "bits" that it was given."""
    size = int(dataset.cardinality().numpy())
    return keras.utils.Progbar(
        size if size >= 0 else None, verbose=int(bool(verbose)), stateful_metrics=["bits"], unit_name="batch"
    )


def _losses_of(model):
    """The function from tokens and targets to float32 losses in nats."""

    @tf.function(reduce_retracing=True)
    def losses_of(tokens, targets):
        logits = tf.cast(model(tokens, training=False), tf.float32)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)

    return losses_of


def evaluate(model: keras.Model, dataset: tf.data.Dataset, verbose: int = 1) -> Evaluation:
    """Mean bits for each token of a data set.

    Sums are in float64, so that neither the order nor the size of batches shows in the first six digits.

    Args:
        model: gives logits `[batch, position, vocab_size]` of tokens `[batch, position]`.
        dataset: finite batches of (tokens, targets) or (tokens, targets, weights), as `stf.data.batches` without a seed
            and `stf.data.windows` give them. Targets of weight 0 do not count; other weights are 1.
        verbose: 1 shows a progress bar with the bits so far.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: nothing counts.
    """

    losses_of = _losses_of(model)
    found, total, count, begin = [], 0.0, 0, time.perf_counter()
    bar = progress_with_bits(dataset, verbose)
    for tokens, targets, *weights in dataset:
        losses = losses_of(tokens, targets).numpy()
        losses = losses[weights[0].numpy() > 0] if weights else losses.reshape(-1)
        found.append(losses)
        total += losses.sum(dtype=np.float64)
        count += losses.size
        bar.add(1, [("bits", total / max(count, 1) / math.log(2))])
    if not count:
        raise ValueError("dataset must have a token that counts. Received: none")
    return Evaluation(float(total / count / math.log(2)), count, np.concatenate(found), time.perf_counter() - begin)
