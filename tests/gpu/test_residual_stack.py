"""The stack as one op of the GPU, beside the layer's loop in float64, and beside that loop in the op's own dtype."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.gpu
if not tf.config.list_physical_devices("GPU"):
    pytest.skip("no GPU", allow_module_level=True)

import stf  # noqa: E402
from stf import ops, patterns  # noqa: E402

LAYOUT = np.tril(np.random.default_rng(0).random((6, 6)) < 0.6)
CASES = {
    # patterns, blocks, heads, key_dim, value_dim, width, ff_dim, batch, positions, dropout
    "strided": ([patterns.Local(24), patterns.Strided(24)], 4, 2, 16, 32, 64, 128, 2, 192, 0.25),
    "one pattern, odd sizes": ([patterns.Causal()], 3, 3, 24, 40, 72, 264, 1, 130, 0.1),
    "heads of two sets": ([patterns.Fixed(32, 4)], 2, 4, 32, 32, 128, 512, 2, 96, 0.0),
    "queries without keys": ([patterns.Summary(32, 4)], 2, 2, 32, 32, 64, 128, 2, 96, 0.1),
    "layouts, period 3": (
        [patterns.Blocks(LAYOUT, 16), patterns.Local(7), patterns.Blocks(LAYOUT | np.eye(6, dtype=bool), 16)],
        4, 2, 16, 16, 64, 64, 2, 96, 0.1,
    ),
    "wide": ([patterns.Local(8)], 2, 2, 64, 64, 1032, 264, 1, 64, 0.1),
}  # fmt: skip


def stack_of(case, dtype, recompute):
    pattern_list, blocks, heads, key_dim, value_dim, width, ff_dim, _, _, dropout = CASES[case]
    stack = stf.layers.SparseResidualStack(
        blocks, pattern_list, heads, key_dim, value_dim, ff_dim, dropout, recompute, seed=3, dtype=dtype,
        bias_initializer="random_normal",
    )  # fmt: skip
    stack.build([None, None, width])
    for i, variable in enumerate(stack.trainable_variables):  # gammas and betas too
        drawn = np.random.default_rng(i).normal(0, 0.1, variable.shape)
        variable.assign(variable + drawn if "gamma" in variable.path or "beta" in variable.path else variable)
    return stack


def run(stack, case, jit_compile):
    """Output and all gradients, in float64."""
    *_, width, _, batch, positions, _ = CASES[case]
    rng = np.random.default_rng(7)
    x, upstream = rng.normal(size=(2, batch, positions, width))
    x, upstream = (tf.cast(tf.cast(t, tf.bfloat16), stack.compute_dtype) for t in (x, upstream))

    @tf.function(jit_compile=jit_compile)
    def compute(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = stack(x, training=True)
        return [output, *tape.gradient(output, [x, *stack.trainable_variables], upstream)]

    if stack.seed_generator is not None:
        stack.seed_generator.state.assign([11, 2])
    return [np.asarray(tf.cast(t, tf.float64)) for t in compute(x, upstream)]


def distances(results, references):
    return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(results, references, strict=True)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64_and_the_loop(case, dtype, monkeypatch):
    with tf.device("CPU"):
        exact = run(stack_of(case, "float64", True), case, jit_compile=False)
    monkeypatch.setattr(ops, "runs_residual_stack", lambda *_: False)
    loop = distances(run(stack_of(case, f"mixed_{dtype}", True), case, jit_compile=False), exact)
    monkeypatch.undo()
    first = {}  # by jit_compile: XLA rounds the weights, which the layer makes ready for the op, otherwise
    for recompute in (True, "attention", False):
        stack = stack_of(case, f"mixed_{dtype}", recompute)
        for jit_compile in (False, True):
            results = run(stack, case, jit_compile)
            again = run(stack, case, jit_compile)
            assert all(map(np.array_equal, results, again)), "other bits in the second run"
            error = distances(results, exact)
            print(f"{case} {dtype} {recompute} {jit_compile}: {(error / loop).max():.2f} of the loop's error at most")
            assert (error <= 1.5 * loop).all(), (error, loop)
            for result, kept in zip(results, first.setdefault(jit_compile, results), strict=True):
                np.testing.assert_array_equal(result, kept)  # kept or computed again: the same numbers


def test_the_op_is_what_runs():
    stack = stack_of("strided", "mixed_bfloat16", True)
    graph = tf.function(lambda x: stack(x, training=True)).get_concrete_function(
        tf.TensorSpec([2, 192, 64], tf.bfloat16)
    )
    assert "StfResidualStack" in {op.type for op in graph.graph.get_operations()}


def test_an_empty_batch():
    stack = stack_of("strided", "mixed_bfloat16", False)
    x = tf.zeros([0, 192, 64], tf.bfloat16)
    with tf.GradientTape() as tape:
        output = stack(x, training=True)
    assert output.shape == [0, 192, 64]
    for grad in tape.gradient(output, stack.trainable_variables):
        np.testing.assert_array_equal(grad, tf.zeros_like(grad))


def test_refusals():
    stack = stack_of("strided", "mixed_bfloat16", True)
    weights = stack.stacked_weights()
    arguments = ([patterns.Local(24)], 2, 16)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"input must be \[batch, position, width\]"):
        ops.residual_stack(tf.zeros([2, 64], tf.bfloat16), weights, None, *arguments)
    with pytest.raises(tf.errors.InvalidArgumentError, match="projection_kernel must have shape"):
        ops.residual_stack(tf.zeros([2, 8, 32], tf.bfloat16), weights, None, *arguments)
    with pytest.raises(tf.errors.InvalidArgumentError, match="hidden_bias must have shape"):
        wrong = weights._replace(hidden_bias=weights.hidden_bias[:, :64])
        ops.residual_stack(tf.zeros([2, 8, 64], tf.bfloat16), wrong, None, *arguments)
    with pytest.raises(tf.errors.InvalidArgumentError, match="layout must have"):
        layout = patterns.Blocks(LAYOUT, 16)
        ops.residual_stack(tf.zeros([2, 8, 64], tf.bfloat16), weights, None, [layout], 2, 16)


def test_differentiable_once():
    stack = stack_of("strided", "mixed_bfloat16", True)
    x = tf.random.stateless_normal([1, 32, 64], [1, 2], dtype=tf.bfloat16)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            output = stack(x, training=True)
        grad = inner.gradient(output, x)
    with pytest.raises(LookupError, match="differentiable once"):
        outer.gradient(grad, x)
