"""Draws of tokens from logits."""

import numpy as np
import tensorflow as tf

from stf.layers.dropout import random_words
from stf.typing import TensorLike


def draw(
    logits: TensorLike,
    temperature: float | tf.Tensor,
    seed: TensorLike,
    top_k: int | tf.Tensor | None = None,
    top_p: float | None = None,
) -> tf.Tensor:
    """One token for each row of logits, by the largest of logits plus Gumbel noise.

    The noise of a row follows from `seed` and the row's number alone: it is the same on every device, compiled or not,
    but for the rounding of logarithms.

    Args:
        logits: `[batch, vocab_size]`.
        temperature: divides the logits, a number or a scalar tensor; 0 takes the likeliest token.
        seed: integers `[2]`, of which 32 bits count.
        top_k: draw from the k likeliest tokens only, an int or a scalar tensor.
        top_p: draw from the fewest likeliest tokens whose probabilities (after `temperature` and `top_k`) add up to
            p or more.

    Returns:
        int32 `[batch]`.
    """
    logits = tf.cast(logits, tf.float32)
    likeliest = tf.argmax(logits, -1, output_type=tf.int32)
    temperature = tf.cast(temperature, tf.float32)
    scaled = logits / tf.where(temperature > 0, temperature, 1.0)
    if top_k is not None or top_p is not None:
        ordered = tf.sort(scaled, direction="DESCENDING")
        least = ordered[:, -1:] if top_k is None else tf.gather(ordered, [top_k - 1], axis=1)
        if top_p is not None:
            kept = tf.where(ordered < least, -np.inf, ordered)
            likelier = tf.cumsum(tf.nn.softmax(kept), exclusive=True, axis=-1)  # than each, in all
            among = tf.reduce_min(tf.where(likelier < top_p, ordered, np.inf), -1, keepdims=True)
            least = tf.maximum(least, among)
        scaled = tf.where(scaled < least, -np.inf, scaled)
    first, second = tf.unstack(tf.cast(tf.cast(seed, tf.int64) & 0xFFFFFFFF, tf.uint32))
    words = random_words(tf.shape(logits), first, second)
    # 23 bits and a half: none is 0 or rounds to 1.
    uniform = (tf.cast(tf.bitwise.right_shift(words, tf.constant(9, tf.uint32)), tf.float32) + 0.5) * 2.0**-23
    drawn = tf.argmax(scaled - tf.math.log(-tf.math.log(uniform)), -1, output_type=tf.int32)
    return tf.where(temperature > 0, drawn, likeliest)
