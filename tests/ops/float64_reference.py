"""Attention and its gradient in NumPy, written out from the formulas: what the op is held against.

It takes a mask `[head, position, position]`, or one a batch row (from tests/paper_sets.py), and knows nothing of stf.
In float64 it is the truth. In float32, with its results rounded to the op's dtype as the op rounds them, it is the same
maths done densely, whose own error is the yardstick for the op's (see `error_budgets`).
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
ULPS = 4  # of float32, of the terms that a result is summed from


class Results(NamedTuple):
    """What attention gives, and the gradients of sum(output * output_grad) + sum(log_sum_exp * log_sum_exp_grad)."""

    output: np.ndarray
    log_sum_exp: np.ndarray
    query_grad: np.ndarray
    key_grad: np.ndarray
    value_grad: np.ndarray


class ResultsWithSink(NamedTuple):
    """The same where each head has a sink."""

    output: np.ndarray
    log_sum_exp: np.ndarray
    query_grad: np.ndarray
    key_grad: np.ndarray
    value_grad: np.ndarray
    sink_grad: np.ndarray  # [head]


class Inputs(NamedTuple):
    """All that attention and its gradient read, in the op's dtype (the log-sum-exp's gradient in float32)."""

    query: np.ndarray  # [batch, position, head, key_depth]
    key: np.ndarray  # [batch, position, key_head, key_depth]
    value: np.ndarray  # [batch, position, key_head, value_depth]
    output_grad: np.ndarray  # [batch, position, head, value_depth]
    log_sum_exp_grad: np.ndarray  # [batch, head, position]
    lengths: np.ndarray | None  # [batch]
    scale: float
    sink: np.ndarray | None = None  # [head]


def random_inputs(
    seed,
    batch,
    positions,
    heads,
    key_depth,
    value_depth,
    dtype="float32",
    lengths=None,
    scale=None,
    key_heads=None,
    with_sink=False,
):
    """Inputs from a seed: normal, in the dtype. Padding holds them too; what it holds must not matter."""
    random = np.random.default_rng(seed)
    of = DTYPES[dtype]
    key_heads = heads if key_heads is None else key_heads
    depths = ((heads, key_depth), (key_heads, key_depth), (key_heads, value_depth), (heads, value_depth))
    shapes = [(batch, positions, *each) for each in depths]
    query, key, value, output_grad = (random.standard_normal(shape, np.float32).astype(of) for shape in shapes)
    log_sum_exp_grad = random.standard_normal((batch, heads, positions), np.float32)
    lengths = None if lengths is None else np.array(lengths, np.int32)
    scale = float(np.float32(1 / max(key_depth, 1) ** 0.5 if scale is None else scale))
    sink = random.standard_normal(heads, np.float32) if with_sink else None
    return Inputs(query, key, value, output_grad, log_sum_exp_grad, lengths, scale, sink)


def attention(inputs, mask, precision=np.float64, rounded=lambda x: x):
    """Attention over the pairs of `mask` and its gradients, and the size of the terms that each is summed from.

    Args:
        inputs: `Inputs`.
        mask: bool `[head, position, position]` or `[batch, head, position, position]`, query by key.
        precision: dtype of the arithmetic.
        rounded: what happens to every result but the log-sum-exp before it is stored.

    Returns:
        `Results`, and `Results` of the largest magnitude of terms behind each.
    """
    q, k, v, d_out = (np.einsum("bihd->bhid", x.astype(precision)) for x in inputs[:4])
    d_lse = inputs.log_sum_exp_grad.astype(precision)[..., None]
    batch, heads, positions, _ = q.shape
    shared = heads // max(k.shape[1], 1)
    k, v = (np.repeat(x, shared, axis=1) for x in (k, v))

    def of_key_heads(x):  # the sum over the heads that share one
        return x.reshape(batch, heads // max(shared, 1), shared, *x.shape[2:]).sum(axis=2)

    allowed = np.broadcast_to(mask, (batch, *mask.shape[-3:]))
    if inputs.lengths is not None:
        used = np.arange(positions) < inputs.lengths[:, None]
        allowed = allowed & used[:, None, :, None] & used[:, None, None, :]
    scale = precision(inputs.scale)
    some = allowed.any(-1, keepdims=True)
    sink = None if inputs.sink is None else inputs.sink.astype(precision)[:, None, None]

    scores = np.where(allowed, scale * (q @ k.swapaxes(-1, -2)), -np.inf)
    top = np.where(some, scores.max(-1, keepdims=True, initial=-np.inf), 0)
    if sink is not None:
        top, some = np.where(some, np.maximum(top, sink), sink), np.ones_like(some)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sink is not None:
        total += np.exp(sink - top)
    with np.errstate(divide="ignore"):
        lse = np.where(some, np.log(total) + top, -np.inf)
    out = rounded((weights / np.where(some, total, 1)) @ v)

    p = np.exp(scores - np.where(some, lse, 0))  # from what forward stored, as in any backward of linear memory
    d_lse = np.where(some, d_lse, 0)
    d_p, delta = d_out @ v.swapaxes(-1, -2), (d_out * out).sum(-1, keepdims=True)
    d_s = p * (d_p - delta + d_lse)
    results = [
        out,
        lse,
        rounded(scale * (d_s @ k)),
        rounded(of_key_heads(scale * (d_s.swapaxes(-1, -2) @ q))),
        rounded(of_key_heads(p.swapaxes(-1, -2) @ d_out)),
    ]

    score_sizes = abs(scale) * (abs(q) @ abs(k).swapaxes(-1, -2))
    weight_sizes = p * (1 + score_sizes / ULPS)  # a weight has a rounding of its score
    terms = p * (abs(d_out) @ abs(v).swapaxes(-1, -2) + (abs(d_out) * abs(out)).sum(-1, keepdims=True) + abs(d_lse))
    sizes = [
        weight_sizes @ abs(v),
        np.where(some, score_sizes.max(-1, keepdims=True, initial=0) + abs(lse), 0),
        abs(scale) * (terms @ abs(k)),
        of_key_heads(abs(scale) * (terms.swapaxes(-1, -2) @ abs(q))),
        of_key_heads(weight_sizes.swapaxes(-1, -2) @ abs(d_out)),
    ]
    kind = Results
    if sink is not None:
        kind, weight = ResultsWithSink, np.exp(sink - lse)
        results.append((weight * (d_lse - delta)).sum((0, 2, 3)))
        sizes.append((weight * (abs(d_lse) + abs(d_out * out).sum(-1, keepdims=True))).sum((0, 2, 3)))
    return _op_layout(kind, *results), kind(*(float(x.max(initial=0)) for x in sizes))


def _op_layout(kind, out, lse, *grads):
    out, *rest = (np.einsum("bhid->bihd", x) if x.ndim == 4 else x for x in (out, *grads))
    return kind(out, lse[..., 0], *rest)


def sink_gradient(inputs, results):
    """The sinks' gradient from what forward stored, in float64, and how far float32 sums may be from it."""
    delta = (inputs.output_grad.astype(np.float64) * results.output.astype(np.float64)).sum(-1).swapaxes(1, 2)
    terms = np.exp(inputs.sink[:, None] - results.log_sum_exp.astype(np.float64)) * (inputs.log_sum_exp_grad - delta)
    size = abs(inputs.output_grad.astype(np.float64) * results.output.astype(np.float64)).sum((0, 1, 3))
    return terms.sum((0, 2)), ULPS * 2.0**-24 * (size + abs(inputs.log_sum_exp_grad).sum((0, 2)))


def largest_errors(results, truth):
    """max |result - truth| of each; where the truth is infinite, the result must be the same infinity."""
    errors = []
    for name, result, true in zip(truth._fields, results, truth, strict=True):
        result = result.astype(np.float64)
        assert result.shape == true.shape, name
        np.testing.assert_array_equal(np.isfinite(result), np.isfinite(true), err_msg=name)
        np.testing.assert_array_equal(result[~np.isfinite(true)], true[~np.isfinite(true)], err_msg=name)
        finite = np.isfinite(true)
        errors.append(float(abs(result[finite] - true[finite]).max(initial=0)))
    return type(truth)(*errors)


def error_budgets(inputs, mask):
    """The truth, and how far the op may be from it: measured, not chosen.

    The yardstick is the error of the same maths done densely: `attention` in float32, each result (and the output
    before the gradients use it) rounded to the inputs' dtype. The op may be wrong by twice that, plus one rounding of
    the largest result to the dtype and `ULPS` float32 roundings of the largest sum of terms: the order of a sum differs
    from the yardstick's (and the yardstick's from one BLAS to another), and on tiny problems it may happen to be exact.
    """
    dtype = inputs.query.dtype
    truth, sizes = attention(inputs, mask)
    dense, _ = attention(inputs, mask, np.float32, lambda x: x.astype(dtype).astype(np.float32))
    yardstick = largest_errors(dense, truth)
    budgets = []
    for name, error, true, size in zip(truth._fields, yardstick, truth, sizes, strict=True):
        largest = abs(true[np.isfinite(true)]).max(initial=0)
        rounding = 2.0**-24 if name in ("log_sum_exp", "sink_grad") else float(ml_dtypes.finfo(dtype).eps) / 2
        budgets.append(2 * error + rounding * largest + ULPS * 2.0**-24 * size)
    return truth, type(truth)(*budgets)
