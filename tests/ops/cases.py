"""The patterns that the op's tests run, each beside its mask from the paper's sets, and the call that runs one."""

import functools

import numpy as np
import paper_sets as sets
import tensorflow as tf

import stf
from ops.float64_reference import Results, ResultsWithSink, error_budgets, largest_errors

HEADS = 3
NAMES = (
    "causal",
    "local",
    "itself",
    "strided",
    "own_block",
    "summary",
    "summary_first",
    "summary_second",
    "first",
    "window_and_first",
    "merged_strided",
    "merged_fixed",
    "two_strides",
    "local_and_two_strides",
    "all_kinds",
    "blocks",
    "blocks_of_heads",
    "blocks_and_local",
    "no_blocks",
    "multihead_strided",
    "multihead_fixed",
    "multihead_mixed",
)


@functools.lru_cache(maxsize=512)
def case(name, l, n):
    """A pattern with stride l for n positions and HEADS heads, and its mask `[head, n, n]`, made without stf."""
    p, m = stf.patterns, l + 2
    c = max(1, l // 3)
    size = max(1, l - 1)
    random = np.random.default_rng([l, n])
    layouts = random.random((HEADS, max(1, -(-n // size)), max(1, -(-n // size)))) < 0.4
    blocks, blocks_of_heads = p.Blocks(layouts[0], size), p.Blocks(layouts, size)
    kinds = {
        "causal": (p.Causal(), lambda h: sets.causal(n)),
        "local": (p.Local(l), lambda h: sets.local(n, l)),
        "itself": (p.Local(0), lambda h: sets.local(n, 0)),
        "strided": (p.Strided(l), lambda h: sets.strided(n, l)),
        "own_block": (p.OwnBlock(l), lambda h: sets.own_block(n, l)),
        "summary": (p.Summary(l, c), lambda h: sets.summary_of_head(n, l, c, h)),
        "summary_first": (p.Summary(l, c, 0), lambda h: sets.summary(n, l, c, 0)),
        "summary_second": (p.Summary(l, 1, l // 2), lambda h: sets.summary(n, l, 1, l // 2)),
        "first": (p.Sink(c), lambda h: sets.first(n, c)),
        "window_and_first": (
            p.Window(l) | p.Sink(m),
            lambda h: sets.union(sets.local(n, l - 1), sets.first(n, m)),
        ),
        "merged_strided": (p.Local(l) | p.Strided(l), lambda h: sets.merged_strided(n, l)),
        "merged_fixed": (p.Fixed(l, c), lambda h: sets.merged_fixed(n, l, c, h)),
        "two_strides": (p.Strided(l) | p.Strided(m), lambda h: sets.union(sets.strided(n, l), sets.strided(n, m))),
        "local_and_two_strides": (
            p.Local(c) | p.Strided(l) | p.Strided(m),
            lambda h: sets.union(sets.local(n, c), sets.strided(n, l), sets.strided(n, m)),
        ),
        "all_kinds": (
            p.Local(c) | p.OwnBlock(l) | p.Strided(m) | p.Summary(m, 2) | blocks,
            lambda h: sets.union(
                sets.local(n, c),
                sets.own_block(n, l),
                sets.strided(n, m),
                sets.summary_of_head(n, m, 2, h),
                sets.blocks(n, layouts[0], size),
            ),
        ),
        "blocks": (blocks, lambda h: sets.blocks(n, layouts[0], size)),
        "blocks_of_heads": (blocks_of_heads, lambda h: sets.blocks(n, layouts[h], size)),
        "blocks_and_local": (
            blocks | p.Local(l),
            lambda h: sets.union(sets.blocks(n, layouts[0], size), sets.local(n, l)),
        ),
        "no_blocks": (p.Blocks(np.zeros_like(layouts[0]), size), lambda h: np.zeros((n, n), bool)),
    }
    heads = {
        "multihead_strided": ("local", "strided"),
        "multihead_fixed": ("own_block", "summary", "merged_fixed"),
        "multihead_mixed": ("two_strides", "causal", "blocks_of_heads"),
    }
    if name in kinds:
        pattern, mask = kinds[name]
        return pattern, np.stack([mask(h) for h in range(HEADS)])
    chosen = [kinds[each] for each in heads[name]]
    pattern = p.PerHead([each[0] for each in chosen])
    return pattern, np.stack([chosen[h % len(chosen)][1](h) for h in range(HEADS)])


def run(inputs, pattern, op=None, **arguments):
    """`Results` of the op (or of another function of its signature) as NumPy arrays in its own dtypes."""
    tensors = [tf.constant(x) for x in inputs[:3]]
    if inputs.sink is not None:
        tensors.append(tf.constant(inputs.sink))
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        outputs = (op or stf.ops.attention)(
            *tensors[:3],
            pattern,
            lengths=inputs.lengths,
            scale=inputs.scale,
            sink=None if inputs.sink is None else tensors[3],
            return_log_sum_exp=True,
            **arguments,
        )
    upstream = [
        tf.cast(x, y.dtype) for x, y in zip((inputs.output_grad, inputs.log_sum_exp_grad), outputs, strict=True)
    ]
    kind = Results if inputs.sink is None else ResultsWithSink
    return kind(*(x.numpy() for x in (*outputs, *tape.gradient(outputs, tensors, upstream))))


def check(inputs, pattern, mask, words="", **arguments):
    """Runs the op and compares outputs and gradients with the float64 reference, within measured budgets."""
    truth, budgets = error_budgets(inputs, mask)
    results = run(inputs, pattern, **arguments)
    for name, error, budget in zip(truth._fields, largest_errors(results, truth), budgets, strict=True):
        assert error <= budget, f"{name} is wrong by {error:.3g}, more than {budget:.3g}: {pattern!r} {words}"
    return results
