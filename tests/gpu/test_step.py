"""The paper's CIFAR-10 model at its size on a GPU: 128 blocks, batch 16, 3,072 positions.

What is true of small models need not be at this size: XLA's Triton matrix products and TensorFlow's own kernels in
stacks of more than 2^31 elements are the cases known (docs/xla.md).
"""

import gc

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.gpu
if not tf.config.list_physical_devices("GPU"):
    pytest.skip("no GPU", allow_module_level=True)

import stf  # noqa: E402
from stf import ops  # noqa: E402

BLOCKS, BATCH, LENGTH = 128, 16, 3072


@pytest.fixture(scope="module", autouse=True)
def memory_as_needed():
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)


def make(policy, recompute, blocks=BLOCKS):
    """The model with random logits' weights: at 0, as they begin, nothing below them has a gradient."""
    model = stf.models.SparseTransformer.from_preset(
        "cifar10", num_blocks=blocks, recompute=recompute, seed=1, dtype=policy
    )
    kernel = model.logits.kernel
    kernel.assign(np.random.default_rng(0).normal(0, 0.05, kernel.shape))
    return model


def gradients(model, jit_compile, times=1):
    """All gradients of the loss of one batch, with the same dropout each time: a list of dictionaries by weight."""
    tokens = tf.constant(np.random.default_rng(1).integers(0, 256, (BATCH, LENGTH)), tf.int32)
    cross_entropy = stf.training.cross_entropy()

    @tf.function(jit_compile=jit_compile, autograph=False)
    def compute(tokens):
        with tf.GradientTape() as tape:
            loss = cross_entropy(tokens, model(tokens, training=True))
        return [tf.convert_to_tensor(grad) for grad in tape.gradient(loss, model.trainable_variables)]

    state, results = model.stack.seed_generator.state, []
    for _ in range(times):
        state.assign(np.array([11, 2]))  # the same dropout, whatever ran before
        names = [variable.path.split("/", 1)[1] for variable in model.trainable_variables]
        results.append(dict(zip(names, (grad.numpy() for grad in compute(tokens)), strict=True)))
    return results


def by_loop(*arguments, **options):
    """Gradients by TensorFlow's loop, where the op would run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "runs_residual_stack", lambda *_: False)
        return gradients(*arguments, **options)


def distance(a, b):
    return np.linalg.norm(a.astype(np.float64) - b)


@pytest.fixture(scope="module")
def uncompiled():
    """Gradients by TensorFlow's loop, uncompiled: in float32 without TF32, and in bfloat16."""
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        [exact] = by_loop(make("float32", recompute=True), jit_compile=False)
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(True)
    [half] = by_loop(make("mixed_bfloat16", recompute=True), jit_compile=False)
    return exact, half


def check(grads, exact, half, label):
    """All finite, and no further from float32's than twice what bfloat16 is off in the uncompiled loop."""
    assert grads.keys() == exact.keys()
    errors = {}
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), name
        errors[name] = distance(grad, exact[name]), distance(half[name], exact[name])
    worst = max(errors, key=lambda name: errors[name][0] / errors[name][1])
    error, own = errors[worst]
    print(f"{label}: {error / own:.2f} of bfloat16's own error, {error / np.linalg.norm(exact[worst]):.1e}, in {worst}")
    assert error <= 2 * own, worst


@pytest.mark.parametrize("recompute", [True, "attention", False])
def test_gradients_at_the_papers_size(recompute, uncompiled):
    model = make("mixed_bfloat16", recompute)
    first, second = gradients(model, jit_compile=True, times=2)
    for name, grad in first.items():
        np.testing.assert_array_equal(grad, second[name], err_msg=f"{name}: other bits in the second run")
    check(first, *uncompiled, f"recompute={recompute}, compiled")
    [graph] = gradients(model, jit_compile=False)
    check(graph, *uncompiled, f"recompute={recompute}, graph")


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_loop_that_keeps_all(jit_compile, uncompiled):
    """What other devices and dtypes run, with the largest tensors that it has."""
    [kept] = by_loop(make("mixed_bfloat16", recompute=False), jit_compile=jit_compile)
    check(kept, *uncompiled, f"loop, jit_compile={jit_compile}")


@pytest.mark.parametrize(("recompute", "kept"), [(True, 0.5), ("attention", 2), (False, 9)])
def test_a_compiled_step_keeps_what_it_should(recompute, kept):
    """Peak memory grows by what is kept of a block, in tensors [batch, position, width] of halves, and by weights.

    Weights, momentum and velocity in float32; kernels and their gradients in bfloat16, as the op has them; gradients in
    float32, as the norm and the update take them.
    """
    peaks = []
    for blocks in (16, 48):
        model = make("mixed_bfloat16", recompute, blocks)
        model.compile(stf.training.optimizer(1e-3), stf.training.cross_entropy())
        tokens = np.random.default_rng(1).integers(0, 256, (BATCH, LENGTH)).astype("int32")
        iterator = iter(tf.data.Dataset.from_tensors((tokens, tokens)).repeat())
        model.make_train_function()
        float(model.train_function(iterator)["loss"])
        tf.config.experimental.reset_memory_stats("GPU:0")
        float(model.train_function(iterator)["loss"])
        peaks.append(tf.config.experimental.get_memory_info("GPU:0")["peak"])
        weights = model.stack.count_params() // blocks
        del model, iterator
        gc.collect()  # models hold circles, and this one's weights would count as the next one's
    statistic = {True: 0, "attention": 4 * BATCH * LENGTH * 2, False: 4 * BATCH * LENGTH * 4}[recompute]
    expected = kept * 2 * BATCH * LENGTH * 256 + statistic + weights * (3 * 4 + 2 * 2 + 4)
    print(
        f"recompute={recompute}: {(peaks[1] - peaks[0]) / 32 / 2**20:.1f} MiB a block, {expected / 2**20:.1f} expected"
    )
    assert (peaks[1] - peaks[0]) / 32 == pytest.approx(expected, rel=0.15)
