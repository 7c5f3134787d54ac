"""Attention over a sparse pattern by the custom op, and the op's gradient."""

import functools

import tensorflow as tf

from stf.ops import library
from stf.patterns import Pattern, lower

DTYPES = (tf.float32, tf.bfloat16, tf.float16)

_lower = functools.lru_cache(maxsize=256)(lower)


def attention(
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
    """Scaled dot-product attention over the pairs of `pattern` (Eqs. 2-4 of the paper).

    Time grows with the pattern's pairs and memory with the length: nothing of size n x n is made.
    Softmax and sums are in float32 whatever the inputs. A query that attends to nothing gets
    output 0 and log-sum-exp -infinity. Differentiable once, in both outputs, with the same bits
    every run.

    Example:
        >>> q = k = v = tf.random.normal([1, 1024, 8, 64])
        >>> stf.ops.attention(q, k, v, stf.patterns.Local(128) | stf.patterns.Strided(128)).shape
        TensorShape([1, 1024, 8, 64])

    Args:
        query: `[batch, position, head, key_depth]`, float32, bfloat16 or float16.
        key: like `query`.
        value: `[batch, position, head, value_depth]`, same dtype.
        pattern: a `stf.patterns.Pattern`.
        lengths: integers `[batch]`, positions in use of each sequence (the rest is padding on the
            right: it attends to nothing and is attended by nothing), or None for all.
        scale: factor of the scores; `1 / sqrt(key_depth)` unless given.
        return_log_sum_exp: also return each query's log-sum-exp of its scores.
        name: of the operation.

    Returns:
        The output `[batch, position, head, value_depth]` in the inputs' dtype; with
        `return_log_sum_exp` also float32 `[batch, head, position]`.

    Raises:
        ValueError: arguments that do not fit, as far as static shapes tell.
        InvalidArgumentError: the same, when the op runs.
        LibraryNotFoundError: the op library is missing; says what to do.
    """
    query, key, value = (tf.convert_to_tensor(x) for x in (query, key, value))
    _check(query, key, value, pattern)
    depth = query.shape[-1]
    if scale is None:
        if depth is None:
            raise ValueError("scale must be given where key_depth is not static.")
        scale = 1.0 / max(depth, 1) ** 0.5
    program = _lower(pattern, query.shape[2])
    lengths = [] if lengths is None else lengths
    output, log_sum_exp = library.load().stf_attention(
        query=query,
        key=key,
        value=value,
        lengths=tf.cast(lengths, tf.int32),
        components=list(program.components),
        program_begin=list(program.program_begin),
        layouts=program.layouts,
        scale=scale,
        name=name,
    )
    return (output, log_sum_exp) if return_log_sum_exp else output


def _check(query, key, value, pattern):
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a stf.patterns.Pattern. Received: pattern={pattern!r}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape.rank not in (None, 4):
            raise ValueError(
                f"{name} must be [batch, position, head, depth]. Received: {name}={tensor.shape}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16. Received: {name}={tensor.dtype.name}"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} must have the query's dtype {query.dtype.name}. "
                f"Received: {name}={tensor.dtype.name}"
            )
    if query.shape.rank is None or query.shape[2] is None:
        raise ValueError(f"query must have a static number of heads. Received: query={query.shape}")


@tf.RegisterGradient("StfAttention")
def _attention_gradient(op, output_grad, log_sum_exp_grad):
    query, key, value, lengths = op.inputs
    output, log_sum_exp = op.outputs
    if output_grad is None:
        output_grad = tf.zeros_like(output)
    if log_sum_exp_grad is None:
        log_sum_exp_grad = tf.zeros_like(log_sum_exp)
    grads = library.load().stf_attention_grad(
        query=query,
        key=key,
        value=value,
        lengths=lengths,
        output=output,
        log_sum_exp=log_sum_exp,
        output_grad=output_grad,
        log_sum_exp_grad=log_sum_exp_grad,
        components=op.get_attr("components"),
        program_begin=op.get_attr("program_begin"),
        layouts=op.get_attr("layouts"),
        scale=op.get_attr("scale"),
    )
    return [*grads, None]


@tf.RegisterGradient("StfAttentionGrad")
def _second_gradient(op, *grads):
    raise LookupError(
        "stf.ops.attention is differentiable once; for second derivatives of short sequences use "
        "stf.ops.reference_attention."
    )
