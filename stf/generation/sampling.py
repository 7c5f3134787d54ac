"""Draws tokens from a decoder's logits."""

import numbers

import keras
import numpy as np
import tensorflow as tf

from stf.generation.decoder import Decoder
from stf.layers.validation import positive, seed_or_none


def draw(logits, temperature, seed, top_k=None, top_p=None):
    """One token for each row of logits.

    Args:
        logits: `[batch, vocab_size]`.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: int32 `[2]`.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the fewest likeliest tokens whose probabilities (after `temperature` and `top_k`) add up to
            p or more.

    Returns:
        int32 `[batch]`.
    """
    if temperature == 0:
        return tf.argmax(logits, -1, output_type=tf.int32)
    logits = logits / temperature
    if top_k is not None:
        least = tf.math.top_k(logits, top_k).values[:, -1:]
        logits = tf.where(logits < least, -float("inf"), logits)
    if top_p is not None:
        ordered = tf.sort(logits, direction="DESCENDING")
        likelier = tf.cumsum(tf.nn.softmax(ordered), exclusive=True, axis=-1)  # than each, in all
        least = tf.reduce_min(tf.where(likelier < top_p, ordered, float("inf")), -1, keepdims=True)
        logits = tf.where(logits < least, -float("inf"), logits)
    return tf.random.stateless_categorical(logits, 1, seed, dtype=tf.int32)[:, 0]


def generate(
    model, batch_size=1, temperature=1.0, prefix=None, length=None, seed=None, top_k=None, verbose=1, top_p=None
):
    """Samples of a `SparseTransformer`; see its method of the same name."""
    length = model.length if length is None else positive("length", length)
    seed = seed_or_none(seed)
    if not isinstance(temperature, numbers.Real) or not temperature >= 0:
        raise ValueError(f"temperature must be a number, 0 or more. Received: temperature={temperature!r}")
    top_k = None if top_k is None else positive("top_k", top_k)
    if top_k is not None and top_k > model.vocab_size:
        raise ValueError(f"top_k must be from 1 to {model.vocab_size}. Received: top_k={top_k!r}")
    if top_p is not None and not (isinstance(top_p, numbers.Real) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be above 0 and at most 1. Received: top_p={top_p!r}")
    prefix = _prefix(prefix, positive("batch_size", batch_size), length, model.vocab_size)
    if not model.built:
        model.build((None, length))
    seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
    decoder = Decoder(model, len(prefix), length)
    tokens = np.zeros((len(prefix), length), np.int32)
    tokens[:, : prefix.shape[1]] = prefix
    bar = keras.utils.Progbar(length, unit_name="token") if verbose else None
    for position in range(length):
        logits = decoder.step(tokens[:, position - 1], position)
        if position >= prefix.shape[1]:
            tokens[:, position] = draw(logits, temperature, [seed, position], top_k, top_p)
        if bar:
            bar.update(position + 1)
    return tokens


def _prefix(prefix, batch_size, length, vocab_size):
    """The tokens that samples begin with, int32 `[batch, position]`; ValueError where they are none."""
    prefix = np.zeros((batch_size, 0), np.int32) if prefix is None else np.asarray(prefix)
    if prefix.ndim != 2 or prefix.shape[1] > length:
        raise ValueError(
            f"prefix must be [batch, position] with at most {length} positions. "
            f"Received: prefix of shape {prefix.shape}"
        )
    if prefix.size and prefix.dtype.kind not in "iu":
        raise ValueError(f"prefix must be integer tokens. Received: prefix of dtype {prefix.dtype}, prefix={prefix!r}")
    for token in prefix[(prefix < 0) | (prefix >= vocab_size)][:1]:
        raise ValueError(f"prefix must hold tokens from 0 to {vocab_size - 1}. Received: prefix with token {token}")
    return prefix.astype(np.int32)
