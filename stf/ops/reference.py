"""Dense attention with the pattern as a mask: the specification of `stf.ops.attention`."""

import numpy as np
import tensorflow as tf

from stf.ops.arguments import check_lengths, check_scale, check_sink, check_tensors
from stf.ops.documents import check_bounds, in_documents
from stf.patterns.pattern import Pattern
from stf.typing import TensorLike

DTYPES = (tf.float64, tf.float32, tf.bfloat16, tf.float16)


def reference_attention(
    query: TensorLike,
    key: TensorLike,
    value: TensorLike,
    pattern: Pattern,
    *,
    lengths: TensorLike | None = None,
    documents: TensorLike | None = None,
    restart: bool = False,
    sink: TensorLike | None = None,
    scale: float | None = None,
    return_log_sum_exp: bool = False,
    name: str | None = None,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """What `stf.ops.attention` computes, from an n x n mask, in the inputs' own dtype.

    For tests, short sequences and second derivatives: memory grows as n squared. Arguments, results
    and rows that attend to nothing are those of `stf.ops.attention`; float64 is taken as well, and
    the log-sum-exp has the inputs' dtype. The number of positions must be static.
    """
    with tf.name_scope(name or "reference_attention"):
        query, key, value = check_tensors(query, key, value, pattern, DTYPES)
        lengths = check_lengths(lengths, query)
        documents = None if documents is None else check_bounds(documents, query)
        sink, scale = check_sink(sink, query), check_scale(scale, query)
        allowed = allowed_pairs(pattern, query.shape[1], query.shape[2], lengths, documents, restart)
        weights, log_sum_exp = reference_weights(query, key, allowed, scale, sink)
        output = weighted_values(weights, value)
        return (output, log_sum_exp) if return_log_sum_exp else output


def pattern_mask(pattern, positions, num_heads):
    """The pattern's pairs as a bool tensor `[head, position, position]`."""
    if positions is None:
        raise ValueError("the number of positions must be static for dense attention.")
    masks = [pattern.mask(positions, head) for head in range(num_heads)]
    return tf.constant(np.stack(masks) if masks else np.zeros((0, positions, positions), bool))


def allowed_pairs(pattern, positions, num_heads, lengths=None, documents=None, restart=False):
    """The pairs that attend, bool `[1 or batch, head, position, position]`, of `reference_attention`'s arguments."""
    allowed = in_documents(pattern_mask(pattern, positions, num_heads)[None], documents, restart)
    if lengths is not None:
        used = tf.sequence_mask(lengths, positions)[:, None]
        allowed = allowed & used[:, :, :, None] & used[:, :, None, :]
    return allowed


def weighted_values(weights, value):
    """The output of weights `[batch, head, position, position]`; heads may share values."""
    return tf.einsum("bhij,bjhd->bihd", weights, _of_each_head(value, weights.shape[1]))


def _of_each_head(tensor, num_heads):
    """A key or a value `[batch, position, key_head, depth]` with as many heads as the query's."""
    shared = num_heads // max(tensor.shape[2], 1)
    return tensor if shared == 1 else tf.repeat(tensor, shared, axis=2)


def reference_weights(query, key, allowed, scale=None, sink=None):
    """Attention weights `[batch, head, position, position]` and their log-sum-exp."""
    scale = 1.0 / max(query.shape[-1], 1) ** 0.5 if scale is None else scale
    key = _of_each_head(key, query.shape[2])
    scores = tf.einsum("bihd,bjhd->bhij", query, key) * tf.cast(scale, query.dtype)
    least = tf.constant(query.dtype.min, query.dtype)
    top = tf.reduce_max(tf.where(allowed, scores, least), -1, keepdims=True)
    if sink is not None:
        sink = tf.cast(sink, query.dtype)[:, None, None]
        top = tf.maximum(top, sink)
    top = tf.stop_gradient(tf.where(top > least, top, tf.zeros_like(top)))
    weights = tf.where(allowed, tf.exp(tf.where(allowed, scores - top, 0)), 0)
    total = tf.reduce_sum(weights, -1, keepdims=True)
    if sink is not None:
        total += tf.exp(sink - top)
    some = total > 0
    safe = tf.where(some, total, 1)
    nothing = tf.constant(-np.inf, query.dtype)
    log_sum_exp = tf.where(some, tf.math.log(safe) + top, nothing)
    return weights / safe, tf.squeeze(log_sum_exp, -1)
