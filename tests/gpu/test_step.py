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
    begin = tf.convert_to_tensor(state).numpy()
    for _ in range(times):
        state.assign(begin)
        names = [variable.path.split("/", 1)[1] for variable in model.trainable_variables]
        results.append(dict(zip(names, (grad.numpy() for grad in compute(tokens)), strict=True)))
    return results


def distance(a, b):
    return np.linalg.norm(a.astype(np.float64) - b)


@pytest.fixture(scope="module")
def uncompiled():
    """Gradients by the uncompiled graph: in bfloat16, and in float32 without TF32."""
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        [exact] = gradients(make("float32", recompute=True), jit_compile=False)
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(True)
    [half] = gradients(make("mixed_bfloat16", recompute=True), jit_compile=False)
    return exact, half


@pytest.mark.parametrize("recompute", [True, "attention", False])
def test_gradients_at_the_papers_size(recompute, uncompiled):
    exact, half = uncompiled
    first, second = gradients(make("mixed_bfloat16", recompute), jit_compile=True, times=2)
    assert first.keys() == exact.keys()
    for name, grad in first.items():
        assert np.isfinite(grad).all(), name
        np.testing.assert_array_equal(grad, second[name], err_msg=f"{name}: other bits in the second run")
        own = distance(half[name], exact[name])
        error = distance(grad, exact[name])
        print(
            f"{recompute!s:10s}{name:40s} error {error / np.linalg.norm(exact[name]):.2e}, {error / own:.2f} of bf16's"
        )
        assert error <= 2 * own, name


def test_the_uncompiled_graph_agrees_with_itself_whatever_it_keeps(uncompiled):
    _, half = uncompiled
    [kept] = gradients(make("mixed_bfloat16", recompute=False), jit_compile=False)
    for name, grad in kept.items():
        assert distance(grad, half[name]) <= 1e-2 * np.linalg.norm(half[name]), name


@pytest.mark.parametrize(("recompute", "kept"), [(True, 1), ("attention", 2), (False, 7)])
def test_a_compiled_step_keeps_what_it_should(recompute, kept):
    """Peak memory grows by what is kept of a block, in tensors [batch, position, width] of halves, and by weights.

    Weights, momentum and velocity in float32, and the kernels and their gradients in bfloat16.
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
    statistic = 4 * BATCH * LENGTH * 2 if recompute is not True else 0
    expected = kept * 2 * BATCH * LENGTH * 256 + statistic + weights * (3 * 4 + 2 * 2)
    print(
        f"recompute={recompute}: {(peaks[1] - peaks[0]) / 32 / 2**20:.1f} MiB a block, {expected / 2**20:.1f} expected"
    )
    assert (peaks[1] - peaks[0]) / 32 == pytest.approx(expected, rel=0.15)
