"""What all data sets give: splits of byte sequences, and batches of them."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf


class Splits(NamedTuple):
    """uint8 sequences `[examples, length]` for training, validation and test, and a line that says what they are."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    description: str


def batches(sequences, batch_size, seed=None, skip=0):
    """A `tf.data.Dataset` of (tokens, tokens), int32 `[batch, length]`.

    Args:
        sequences: uint8 `[examples, length]`.
        batch_size: sequences of a batch.
        seed: shuffles anew every epoch, by this seed, and repeats for ever; None keeps the order, once, and
            drops nothing.
        skip: batches to leave out at the start: what a resumed run has seen already.
    """
    if len(sequences) < 1 or batch_size < 1:
        raise ValueError(
            f"there must be examples and a batch_size of at least 1. "
            f"Received: {len(sequences)} examples, batch_size={batch_size}"
        )
    index = tf.data.Dataset.range(len(sequences))
    if seed is not None:
        index = index.shuffle(len(sequences), seed=seed, reshuffle_each_iteration=True).repeat()
    index = index.batch(batch_size, drop_remainder=seed is not None).skip(skip)
    table = tf.constant(sequences)

    def gather(rows):
        tokens = tf.cast(tf.gather(table, rows), tf.int32)
        return tokens, tokens

    return index.map(gather, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def order0_entropy(sequences):
    """Bits for each byte of the best code that knows the bytes' frequencies and nothing else."""
    counts = np.bincount(np.asarray(sequences).ravel(), minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())
