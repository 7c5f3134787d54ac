"""The op on a GPU under TensorFlow: beside the CPU's kernels and float64, in graphs, strategies and training."""

import itertools
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from ops.cases import HEADS, NAMES, case
from ops.float64_reference import (
    DTYPES,
    Results,
    ResultsWithSink,
    error_budgets,
    largest_errors,
    random_inputs,
    sink_gradient,
)
from paper_sets import segment_ids, within_documents

import stf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="needs an NVIDIA GPU"),
]
PATTERN = stf.patterns.Local(12) | stf.patterns.Strided(12)


def run_on(device, inputs, pattern, ids=None, restart=False):
    with tf.device(device):
        tensors = [tf.constant(x) for x in inputs[:3]]
        lengths = None if inputs.lengths is None else tf.constant(np.asarray(inputs.lengths, "int32"))
        if inputs.sink is not None:
            tensors.append(tf.constant(inputs.sink))
        more = {"documents": None if ids is None else stf.ops.document_bounds(ids), "restart": restart}
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            more["sink"] = None if inputs.sink is None else tensors[3]
            outputs = stf.ops.attention(
                *tensors[:3], pattern, lengths=lengths, scale=inputs.scale, return_log_sum_exp=True, **more
            )
        upstream = [
            tf.cast(x, y.dtype) for x, y in zip((inputs.output_grad, inputs.log_sum_exp_grad), outputs, strict=True)
        ]
        results = (*outputs, *tape.gradient(outputs, tensors, upstream))
    assert all(device.strip("/") in x.device for x in results)
    return (Results if inputs.sink is None else ResultsWithSink)(*(x.numpy() for x in results))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_against_float64(name, dtype):
    for l, n, depths, lengths in itertools.product((6, 64), (0, 1, 101, 205), ((24, 40), (64, 128)), (None, (60, 1))):
        lengths = None if lengths is None else [min(n, x) for x in lengths]
        inputs = random_inputs([l, n], 2, n, HEADS, *depths, dtype, lengths=lengths)
        pattern, mask = case(name, l, n)
        truth, budgets = error_budgets(inputs, mask)
        results = run_on("GPU:0", inputs, pattern)
        for which, error, budget in zip(Results._fields, largest_errors(results, truth), budgets, strict=True):
            assert error <= budget, (
                f"{which} is wrong by {error:.3g}, more than {budget:.3g}: {l} {n} {depths} {lengths}"
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_documents_shared_heads_and_sinks_against_float64(name, dtype):
    """Documents of some length: of sums of few terms tests/gpu/test_kernels.py has the halves' own budgets."""
    ids = np.repeat([[0, 0, 0, 0], [0, 1, -1, 2]], [70, 60, 15, 60], axis=1).astype(np.int32)
    pattern, mask = case(name, 12, 205)
    for restart, key_heads, depths in ((False, 1, (24, 40)), (True, HEADS, (64, 128)), (True, 1, (64, 64))):
        sizes = 2, 205, HEADS, *depths
        inputs = random_inputs(3, *sizes, dtype, [205, 190], key_heads=key_heads, with_sink=name != "itself")
        truth, budgets = error_budgets(inputs, within_documents(mask, ids, restart))
        results = run_on("GPU:0", inputs, pattern, ids, restart)
        for which, error, budget in zip(Results._fields, largest_errors(results, truth), budgets, strict=False):
            assert error <= budget, f"{which} is wrong by {error:.3g}, more than {budget:.3g}: {restart} {key_heads}"
        if inputs.sink is not None:  # of two outputs that are rounded otherwise, it is no further apart than they
            sink_grad, budget = sink_gradient(inputs, results)
            assert (abs(results.sink_grad - sink_grad) <= budget).all(), f"sink_grad: {restart} {key_heads}"


@pytest.mark.parametrize("name", ["merged_strided", "merged_fixed", "blocks_and_local"])
def test_documents_under_xla_give_the_same_bits(name):
    ids = tf.constant(segment_ids(205, 4))
    pattern, _ = case(name, 12, 205)
    inputs = random_inputs(3, 4, 205, HEADS, 64, 64, "bfloat16", key_heads=1, with_sink=True)

    def step(ids, query, key, value, sink):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            output = stf.ops.attention(
                query, key, value, pattern, documents=stf.ops.document_bounds(ids), restart=True, sink=sink
            )
        return output, *tape.gradient(output, [query, key, value], tf.constant(inputs.output_grad))

    tensors = [ids, *map(tf.constant, inputs[:3]), tf.constant(inputs.sink)]
    for compiled, plain in zip(tf.function(step, jit_compile=True)(*tensors), step(*tensors), strict=True):
        np.testing.assert_array_equal(tf.cast(compiled, tf.float32), tf.cast(plain, tf.float32))


def test_cpu_and_gpu_agree():
    for name in NAMES:
        inputs = random_inputs(1, 2, 130, HEADS, 32, 32)
        cpu, gpu = (run_on(device, inputs, case(name, 12, 130)[0]) for device in ("CPU:0", "GPU:0"))
        for a, b in zip(cpu, gpu, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5)


def test_same_bits_every_time():
    for name, dtype in itertools.product(NAMES, DTYPES):
        inputs = random_inputs(1, 2, 300, HEADS, 32, 64, dtype)
        first = run_on("GPU:0", inputs, case(name, 12, 300)[0])
        for _ in range(20):
            for a, b in zip(run_on("GPU:0", inputs, case(name, 12, 300)[0]), first, strict=True):
                np.testing.assert_array_equal(a, b)


def test_lengths_outside_the_sequence_are_cut():
    inputs = random_inputs(1, 2, 40, 2, 8, 8, lengths=[40, 0])
    want = run_on("GPU:0", inputs, PATTERN)
    got = run_on("GPU:0", inputs._replace(lengths=[1000, -3]), PATTERN)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_refuses_what_the_gpu_does_not_take():
    with tf.device("GPU:0"):
        x = tf.zeros([1, 4, 1, 264])
        with pytest.raises(tf.errors.InvalidArgumentError, match="depth from 1 to 256.*264"):
            stf.ops.attention(x, x, x, PATTERN)


def test_float32_is_float32_whatever_tensorflows_switch_says():
    inputs = random_inputs(1, 1, 200, 2, 64, 64)
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    results = []
    for enabled in (True, False):
        tf.config.experimental.enable_tensor_float_32_execution(enabled)
        results.append(run_on("GPU:0", inputs, PATTERN))
    tf.config.experimental.enable_tensor_float_32_execution(before)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_graph_of_dynamic_shapes_and_saved_model(tmp_path):
    module = tf.Module()
    signature = [tf.TensorSpec([None, None, 2, 8])] * 3
    module.call = tf.function(lambda q, k, v: stf.ops.attention(q, k, v, PATTERN), input_signature=signature)
    tf.saved_model.save(module, tmp_path)
    again = tf.saved_model.load(tmp_path)
    for n in (0, 1, 77):
        q, k, v = random_inputs(1, 2, n, 2, 8, 8)[:3]
        with tf.device("GPU:0"):
            np.testing.assert_allclose(again.call(q, k, v), stf.ops.reference_attention(q, k, v, PATTERN), atol=1e-5)


IN_A_GRAPH = """
import tensorflow as tf, stf

@tf.function(jit_compile=True)
def compute(x):
    pattern = stf.patterns.Local(12) | stf.patterns.Strided(12)
    y = stf.ops.attention(tf.sin(x), tf.cos(x), x, pattern)
    return tf.exp(stf.ops.attention(2 * y, tf.cos(y), y, pattern))

x = tf.random.stateless_normal([2, 100, 2, 32], [1, 2])
first = compute(x)
for _ in range(5):
    tf.debugging.assert_equal(compute(x), first)
"""


def test_inside_a_command_buffer(tmp_path):
    """XLA captures the op in a CUDA graph, with the kernels around it, and its results stay the same."""
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text --xla_gpu_graph_min_graph_size=1"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    subprocess.run([sys.executable, "-c", IN_A_GRAPH], env=environment, check=True)
    [before] = tmp_path.glob("*compute*.thunk_sequence.txt")
    assert before.read_text().count("kCustomCall") == 2
    [after] = tmp_path.glob("*compute*.thunk_sequence_after_thunk_passes.txt")
    lines = after.read_text().splitlines()
    assert [line.split()[1] for line in lines if re.match(r"\d+:", line)] == ["kCommandBuffer"]
    assert sum("kCustomCall" in line for line in lines) == 2


def small_model(seed=1, **arguments):
    keras.utils.set_random_seed(seed)
    return stf.models.SparseTransformer.from_preset("cifar10-small", seed=seed, **arguments)


def curve(model, images, steps=30):
    model.compile(stf.training.optimizer(3e-3), stf.training.cross_entropy())
    data = tf.data.Dataset.from_tensor_slices((images, images)).repeat().batch(4, drop_remainder=True)
    return np.array([model.train_on_batch(*batch) for batch in data.take(steps)])


SHARED = pathlib.Path(os.environ.get("STF_SHARED_DATA", pathlib.Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def images():
    """Real CIFAR-10 images where there are some, else cuts of photographs."""
    real = (SHARED / "tfds").exists()
    found = stf.data.cifar10.load(str(SHARED / "tfds"), download=False) if real else stf.data.photographs.load()
    return found.train[:64].astype("int32")


def test_training_on_the_gpu_follows_the_cpu(images):
    with tf.device("CPU:0"):
        cpu = curve(small_model(), images)
    with tf.device("GPU:0"):
        gpu = curve(small_model(), images)
    assert cpu[-1] < cpu[0] - 0.5
    np.testing.assert_allclose(gpu, cpu, rtol=2e-2)


def test_mirrored_strategy_of_one_gpu(images):
    strategy = tf.distribute.MirroredStrategy(["GPU:0"])
    with strategy.scope():
        model = small_model()
        model.compile(stf.training.optimizer(3e-3), stf.training.cross_entropy())
    history = model.fit(images[:16], images[:16], batch_size=4, epochs=2, verbose=0).history["loss"]
    assert history[1] < history[0]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains(policy, images):
    keras.config.set_dtype_policy(policy)
    try:
        losses = curve(small_model(recompute=True, dropout=0.1), images)
    finally:
        keras.config.set_dtype_policy("float32")
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.5


def test_memory_of_a_million_positions():
    """Nothing quadratic, no copy of query, key or value: the extra bytes are delta alone."""
    n, heads, depth = 1 << 20, 1, 64
    with tf.device("GPU:0"):
        q = tf.cast(tf.random.stateless_normal([1, n, heads, depth], [1, 2]), tf.bfloat16)
        tf.config.experimental.reset_memory_stats("GPU:0")
        before = tf.config.experimental.get_memory_info("GPU:0")["current"]
        with tf.GradientTape() as tape:
            tape.watch(q)
            output = stf.ops.attention(q, q, q, stf.patterns.Local(1024))
        tape.gradient(output, q)
        peak = tf.config.experimental.get_memory_info("GPU:0")["peak"] - before
    tensor = n * heads * depth * 2
    print(f"peak beyond the inputs {peak / 2**20:.0f} MiB, one tensor {tensor / 2**20:.0f} MiB")
    assert peak < 9 * tensor  # output, its gradient, three gradients, their sum, log-sum-exp and its gradient, delta
