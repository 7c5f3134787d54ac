"""Attention of queries, keys and values that lie side by side in one tensor, as one matrix product gives them."""

import numbers

import tensorflow as tf

from stf.ops import library
from stf.ops.program import arguments_of, program_arguments
from stf.patterns.pattern import Pattern
from stf.typing import TensorLike


def packed_attention(
    query_key_value: TensorLike, pattern: Pattern, num_heads: int, key_dim: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """`attention` of one tensor that holds query, key and value.

    The kernels read the tensor where it lies: it is not taken apart, and its gradient is not put together.

    Args:
        query_key_value: `[batch, position, num_heads * (2 key_dim + value_dim)]`, float32, bfloat16 or float16: the
            queries of all heads, then the keys, then the values.
        pattern: a `stf.patterns.Pattern`.
        num_heads: number of heads.
        key_dim: depth of a head's query and key.

    Returns:
        The output `[batch, position, head, value_dim]`, and its log-sum-exp `[batch, head, position]`, float32,
        through which nothing is differentiated.

    Raises:
        ValueError: `num_heads` or `key_dim` is no int of 1 or more, or the pattern does not fit the heads.
        InvalidArgumentError: a width that does not fit.
        LibraryNotFoundError: the op library is missing; says what to do.
    """
    for name, value in (("num_heads", num_heads), ("key_dim", key_dim)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} must be an int, 1 or more. Received: {name}={value!r}")
    pattern.check_heads(num_heads)
    output, log_sum_exp = library.load().stf_packed_attention(
        query_key_value=query_key_value,
        lengths=[],
        num_heads=num_heads,
        key_depth=key_dim,
        scale=key_dim**-0.5,
        **program_arguments(pattern, num_heads),
    )
    return output, tf.stop_gradient(log_sum_exp)


def packed_attention_gradient(
    query_key_value: TensorLike,
    pattern: Pattern,
    num_heads: int,
    key_dim: int,
    output: tf.Tensor,
    log_sum_exp: tf.Tensor,
    output_grad: tf.Tensor,
) -> tf.Tensor:
    """The gradient of `packed_attention`'s first argument, from what it gave and the gradient of its output.

    For whoever keeps output and log-sum-exp under a tape of their own: attention is not computed again.

    Args:
        query_key_value, pattern, num_heads, key_dim: what `packed_attention` was called with.
        output: `[batch, position, head, value_dim]`, and
        log_sum_exp: `[batch, head, position]`, what it gave.
        output_grad: like `output`.

    Returns:
        A tensor like `query_key_value`.
    """
    return library.load().stf_packed_attention_grad(
        query_key_value=query_key_value,
        lengths=[],
        output=output,
        log_sum_exp=log_sum_exp,
        output_grad=output_grad,
        num_heads=num_heads,
        key_depth=key_dim,
        scale=key_dim**-0.5,
        **program_arguments(pattern, num_heads),
    )


@tf.RegisterGradient("StfPackedAttention")
def _gradient(op, output_grad, _):
    output, log_sum_exp = op.outputs
    grad = library.load().stf_packed_attention_grad(
        query_key_value=op.inputs[0],
        output=output,
        log_sum_exp=log_sum_exp,
        output_grad=tf.zeros_like(output) if output_grad is None else output_grad,
        num_heads=op.get_attr("num_heads"),
        key_depth=op.get_attr("key_depth"),
        **arguments_of(op, 1),
    )
    return [grad, *(None for _ in op.inputs[1:])]


@tf.RegisterGradient("StfPackedAttentionGrad")
def _second_gradient(op, *grads):
    raise LookupError("stf's attention is differentiable once.")
