"""Dense attention with the pattern as a mask: the specification of `stf.ops.attention`."""

import numpy as np
import tensorflow as tf

from stf.ops.arguments import check_lengths, check_scale, check_tensors

DTYPES = (tf.float64, tf.float32, tf.bfloat16, tf.float16)


def reference_attention(
    query,
    key,
    value,
    pattern,
    *,
    lengths=None,
    scale=None,
    return_log_sum_exp=False,
    name=None,
):
    """What `stf.ops.attention` computes, from an n x n mask, in the inputs' own dtype.

    For tests, short sequences and second derivatives: memory grows as n squared. Arguments, results
    and rows that attend to nothing are those of `stf.ops.attention`; float64 is taken as well, and
    the log-sum-exp has the inputs' dtype. The number of positions must be static.
    """
    with tf.name_scope(name or "reference_attention"):
        query, key, value = check_tensors(query, key, value, pattern, DTYPES)
        lengths = check_lengths(lengths, query)
        allowed = pattern_mask(pattern, query.shape[1], query.shape[2])[None]
        if lengths is not None:
            used = tf.sequence_mask(lengths, query.shape[1])[:, None]
            allowed = allowed & used[:, :, :, None] & used[:, :, None, :]
        weights, log_sum_exp = reference_weights(query, key, allowed, check_scale(scale, query))
        output = tf.einsum("bhij,bjhd->bihd", weights, value)
        return (output, log_sum_exp) if return_log_sum_exp else output


def pattern_mask(pattern, positions, num_heads):
    """The pattern's pairs as a bool tensor `[head, position, position]`."""
    if positions is None:
        raise ValueError("the number of positions must be static for dense attention.")
    masks = [pattern.mask(positions, head) for head in range(num_heads)]
    return tf.constant(np.stack(masks) if masks else np.zeros((0, positions, positions), bool))


def reference_weights(query, key, allowed, scale=None):
    """Attention weights `[batch, head, position, position]` and their log-sum-exp."""
    scale = 1.0 / max(query.shape[-1], 1) ** 0.5 if scale is None else scale
    scores = tf.einsum("bihd,bjhd->bhij", query, key) * tf.cast(scale, query.dtype)
    least = tf.constant(query.dtype.min, query.dtype)
    top = tf.reduce_max(tf.where(allowed, scores, least), -1, keepdims=True)
    top = tf.stop_gradient(tf.where(top > least, top, tf.zeros_like(top)))
    weights = tf.where(allowed, tf.exp(tf.where(allowed, scores - top, 0)), 0)
    total = tf.reduce_sum(weights, -1, keepdims=True)
    some = total > 0
    safe = tf.where(some, total, 1)
    nothing = tf.constant(-np.inf, query.dtype)
    log_sum_exp = tf.where(some, tf.math.log(safe) + top, nothing)
    return weights / safe, tf.squeeze(log_sum_exp, -1)
