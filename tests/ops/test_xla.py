"""The op under XLA: the same kernels, so the same bits; and what a compiled function must survive."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import stf
from ops.cases import HEADS, NAMES, case, run
from ops.float64_reference import random_inputs

DTYPES = ("float32", "bfloat16", "float16")
PATTERN = stf.patterns.Local(3) | stf.patterns.Strided(3)


def compiled_run(inputs, pattern):
    """`run` with forward and backward in one function that XLA compiles."""

    @tf.function(jit_compile=True)
    def step(query, key, value, output_grad, log_sum_exp_grad):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            outputs = stf.ops.attention(
                query,
                key,
                value,
                pattern,
                lengths=inputs.lengths,
                scale=inputs.scale,
                return_log_sum_exp=True,
            )
        upstream = [tf.cast(x, y.dtype) for x, y in zip((output_grad, log_sum_exp_grad), outputs, strict=True)]
        return *outputs, *tape.gradient(outputs, [query, key, value], upstream)

    tensors = [tf.constant(x) for x in inputs[:3]]
    return [x.numpy() for x in step(*tensors, inputs.output_grad, inputs.log_sum_exp_grad)]


def check(inputs, pattern):
    for compiled, plain in zip(compiled_run(inputs, pattern), run(inputs, pattern), strict=True):
        assert compiled.dtype == plain.dtype
        np.testing.assert_array_equal(compiled, plain)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_as_without_xla(name):
    check(random_inputs(5, 2, 53, HEADS, 12, 20), case(name, 7, 53)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_lengths_and_scale(dtype):
    inputs = random_inputs(6, 3, 40, HEADS, 8, 16, dtype, lengths=[40, 0, 17], scale=-0.3)
    check(inputs, case("merged_strided", 6, 40)[0])
    check(inputs, case("blocks_of_heads", 6, 40)[0])


@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0), (1, 1)])
def test_little_or_nothing(batch, n):
    check(random_inputs(7, batch, n, 2, 8, 8), PATTERN)


def test_every_batch_size_and_length_through_one_function():
    call = tf.function(lambda x: stf.ops.attention(x, x, x, PATTERN), jit_compile=True, reduce_retracing=True)
    for batch, n in ((2, 9), (3, 9), (3, 17), (1, 64)):
        x = random_inputs(n, batch, n, 2, 8, 8).query
        np.testing.assert_array_equal(call(x), stf.ops.attention(x, x, x, PATTERN))


def test_fuses_with_what_stands_around_it():
    x = tf.constant(random_inputs(8, 2, 30, 2, 8, 8).query)

    def call(x):
        y = tf.transpose(tf.nn.gelu(x), [0, 1, 3, 2])  # XLA may like another layout than the kernels
        return tf.reduce_sum(stf.ops.attention(tf.transpose(y, [0, 1, 3, 2]), x * 2, x + 1, PATTERN) ** 2, -1)

    np.testing.assert_allclose(tf.function(call, jit_compile=True)(x), call(x), rtol=1e-5)


def test_saved_model_that_is_compiled(tmp_path):
    module = tf.Module()
    signature = [tf.TensorSpec([None, None, 2, 8])]
    module.call = tf.function(
        lambda x: stf.ops.attention(x, x, x, PATTERN), input_signature=signature, jit_compile=True
    )
    tf.saved_model.save(module, tmp_path)
    x = random_inputs(1, 2, 30, 2, 8, 8).query
    np.testing.assert_array_equal(tf.saved_model.load(tmp_path).call(x), stf.ops.attention(x, x, x, PATTERN))


def test_recompute_grad():
    x = tf.constant(random_inputs(1, 2, 30, 2, 8, 8).query)

    def gradient(attend):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(attend(x)))
        return tape.gradient(loss, x)

    def attend(x):
        return stf.ops.attention(x, x, x, PATTERN)

    again = tf.function(lambda: gradient(tf.recompute_grad(attend)), jit_compile=True)()
    np.testing.assert_allclose(again, gradient(attend), rtol=1e-5, atol=1e-6)


def test_a_library_that_comes_late():
    """XLA has run before the op's library is loaded."""
    program = (
        "import tensorflow as tf, stf, numpy as np\n"
        "x = tf.random.normal([1, 9, 2, 4])\n"
        "tf.function(lambda x: x * 2, jit_compile=True)(x)\n"
        "call = lambda x: stf.ops.attention(x, x, x, stf.patterns.Local(3))\n"
        "np.testing.assert_array_equal(tf.function(call, jit_compile=True)(x), call(x))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_refuses_lengths_that_do_not_fit():
    x = tf.ones([2, 6, 2, 4])
    call = tf.function(lambda n: stf.ops.attention(x, x, x, PATTERN, lengths=n), jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"lengths\[1\]=7"):
        call(tf.constant([6, 7]))


def test_refuses_shapes_that_do_not_fit():
    spec = tf.TensorSpec([None, None, 2, 4])
    call = tf.function(lambda q, k: stf.ops.attention(q, k, k, PATTERN), input_signature=[spec, spec], jit_compile=True)
    x = np.ones([2, 6, 2, 4], "float32")
    with pytest.raises(tf.errors.InvalidArgumentError, match="key must have shape"):
        call(x, x[:, :5])
