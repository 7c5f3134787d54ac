"""Attention over a sparse pattern by the custom op, and the op's gradient."""

import tensorflow as tf

from stf.ops import library
from stf.ops.arguments import check_lengths, check_scale, check_sink, check_tensors
from stf.ops.documents import check_bounds
from stf.ops.program import arguments_of, program_arguments
from stf.patterns.pattern import Pattern
from stf.typing import TensorLike

DTYPES = (tf.float32, tf.bfloat16, tf.float16)


def attention(
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
    """Scaled dot-product attention over the pairs of `pattern` (Eqs. 2-4 of the paper).

    Time grows with the pattern's pairs and memory with the length: nothing of size n x n is made.
    Softmax and sums are in float32 whatever the inputs. A query that attends to nothing gets
    output 0 and log-sum-exp -infinity (with a sink, the sink). Differentiable once, in both outputs, with the same bits
    every run.

    Examples:
        >>> q = k = v = tf.random.normal([1, 1024, 8, 64])
        >>> stf.ops.attention(q, k, v, stf.patterns.Local(128) | stf.patterns.Strided(128)).shape
        TensorShape([1, 1024, 8, 64])

    Args:
        query: `[batch, position, head, key_dim]`, float32, bfloat16 or float16.
        key: `[batch, position, key_head, key_dim]`, same dtype. The number of key heads divides that of
            heads (grouped-query attention; one: multi-query): with `g` of them, head h reads key and value
            head `h // (heads / g)`, and no copies are made.
        value: `[batch, position, key_head, value_dim]`, same dtype.
        pattern: a `stf.patterns.Pattern`.
        lengths: integers `[batch]`, positions in use of each sequence (the rest is padding on the
            right: it attends to nothing and is attended by nothing), or None for all. From 0 to
            the number of positions; others are refused where the host has them at hand, and cut to
            that range on a GPU, where a look at them would have every call wait for the device.
        documents: what `document_bounds` gives of sequences with several documents: a query attends to keys of
            its own alone. None: each sequence is one document.
        restart: whether the pattern's positions are counted from each document's first one on, not from the
            sequence's. Blocks and summaries begin anew with each document then.
        sink: `[head]`, a score in each softmax of a head that belongs to no key: it takes weight, and gives
            no value ("off by one" for 0). None: there is none.
        scale: factor of the scores, a finite Python number; `1 / sqrt(key_dim)` unless given.
        return_log_sum_exp: also return each query's log-sum-exp of its scores.
        name: of the operation.

    Returns:
        The output `[batch, position, head, value_dim]` in the inputs' dtype; with
        `return_log_sum_exp` also float32 `[batch, head, position]`.

    Raises:
        ValueError: arguments that do not fit, as far as static shapes tell.
        NotImplementedError: a pattern of one's own that is no `Component`, see `stf.patterns.Pattern`.
        InvalidArgumentError: arguments that do not fit, when the op runs.
        LibraryNotFoundError: the op library is missing; says what to do.
    """
    query, key, value = check_tensors(query, key, value, pattern, DTYPES)
    lengths = check_lengths(lengths, query)
    documents = None if documents is None else check_bounds(documents, query)
    sink = check_sink(sink, query)
    scale = check_scale(scale, query)
    output, log_sum_exp = library.load().stf_attention(
        query=query,
        key=key,
        value=value,
        lengths=[] if lengths is None else [lengths],
        documents=[] if documents is None else [documents],
        sinks=[] if sink is None else [tf.cast(sink, tf.float32)],
        scale=scale,
        constant_log_sum_exp=not return_log_sum_exp,
        name=name,
        **program_arguments(pattern, query.shape[2], bool(restart) and documents is not None),
    )
    return (output, log_sum_exp) if return_log_sum_exp else output


@tf.RegisterGradient("StfAttention")
def _attention_gradient(op, output_grad, log_sum_exp_grad):
    query, key, value = op.inputs[:3]
    output, log_sum_exp = op.outputs
    if output_grad is None:
        output_grad = tf.zeros_like(output)
    through_both = log_sum_exp_grad is not None and not op.get_attr("constant_log_sum_exp")
    grads = library.load().stf_attention_grad(
        query=query,
        key=key,
        value=value,
        output=output,
        log_sum_exp=log_sum_exp,
        output_grad=output_grad,
        log_sum_exp_grad=[log_sum_exp_grad] if through_both else [],
        **arguments_of(op, 3, ("lengths", "layout_bits", "documents")),
    )
    others = [None for _ in op.inputs[3:]]
    if op.get_attr("num_sinks"):
        others[-1] = _sink_gradient(op, output_grad, log_sum_exp_grad if through_both else None)
    return [*grads, *others]


def _sink_gradient(op, output_grad, log_sum_exp_grad):
    """-sum over queries of p (output . output_grad - log_sum_exp_grad), p the sink's weight."""
    output, log_sum_exp = op.outputs
    sink = op.inputs[-1][:, None]
    # Where a row is not in use its output is 0, and its gradient may be anything.
    products = tf.math.multiply_no_nan(tf.cast(output_grad, tf.float32), tf.cast(output, tf.float32))
    delta = tf.transpose(tf.reduce_sum(products, axis=3), [0, 2, 1])
    if log_sum_exp_grad is not None:
        delta -= log_sum_exp_grad
    weight = tf.where(tf.math.is_finite(sink), tf.exp(sink - log_sum_exp), 0.0)
    return -tf.reduce_sum(weight * delta, axis=[0, 2])


@tf.RegisterGradient("StfAttentionGrad")
def _second_gradient(op, *grads):
    raise LookupError(
        "stf.ops.attention is differentiable once; for second derivatives of short sequences use "
        "stf.ops.reference_attention."
    )
