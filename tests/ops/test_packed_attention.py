"""Attention of one tensor that holds query, key and value: the same bits as of three."""

import numpy as np
import pytest
import tensorflow as tf

import stf
from ops.cases import HEADS, NAMES, case
from ops.float64_reference import DTYPES, random_inputs

L, N = 7, 61


def packed_and_apart(dtype, batch=2, n=N, depths=(12, 20)):
    """Query, key and value in one tensor and apart, and an upstream gradient."""
    inputs = random_inputs(5, batch, n, HEADS, *depths, dtype)
    apart = [tf.constant(x) for x in inputs[:3]]
    packed = tf.concat([tf.reshape(x, [batch, n, -1]) for x in apart], -1)
    return packed, apart, tf.cast(inputs.output_grad, packed.dtype)


def gradients_apart(apart, pattern, upstream):
    with tf.GradientTape() as tape:
        tape.watch(apart)
        output, log_sum_exp = stf.ops.attention(*apart, pattern, return_log_sum_exp=True)
    grads = tape.gradient(output, apart, upstream)
    return output, log_sum_exp, tf.concat([tf.reshape(x, [*x.shape[:2], -1]) for x in grads], -1)


def gradients_packed(packed, pattern, upstream, key_dim=12):
    with tf.GradientTape() as tape:
        tape.watch(packed)
        output, log_sum_exp = stf.ops.packed_attention(packed, pattern, HEADS, key_dim)
    again = stf.ops.packed_attention_gradient(packed, pattern, HEADS, key_dim, output, log_sum_exp, upstream)
    return output, log_sum_exp, tape.gradient(output, packed, upstream), again


def check(packed, apart, upstream, pattern, run=gradients_packed):
    output, log_sum_exp, grad = gradients_apart(apart, pattern, upstream)
    found = run(packed, pattern, upstream)
    for a, b in zip(found, (output, log_sum_exp, grad, grad), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert np.any(grad) == np.any(pattern.mask(N))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_attention_bit_for_bit(name, dtype):
    check(*packed_and_apart(dtype), case(name, L, N)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["merged_strided", "multihead_fixed", "blocks_of_heads"])
def test_compiled_too(name, dtype):
    pattern = case(name, L, N)[0]
    compiled = tf.function(lambda packed, upstream: gradients_packed(packed, pattern, upstream), jit_compile=True)
    check(*packed_and_apart(dtype), pattern, lambda packed, _, upstream: compiled(packed, upstream))


@pytest.mark.parametrize(("batch", "n"), [(0, 5), (1, 1), (2, 0), (5, 130)])
def test_sizes(batch, n):
    packed, apart, upstream = packed_and_apart("float32", batch, n)
    pattern = stf.patterns.Local(5) | stf.patterns.Strided(5)
    expected = gradients_apart(apart, pattern, upstream)
    for a, b in zip(gradients_packed(packed, pattern, upstream), (*expected, expected[-1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_gradient_is_of_what_it_is_given():
    """It takes output and log-sum-exp as they are, and does not compute attention again."""
    packed, apart, upstream = packed_and_apart("float32")
    pattern = stf.patterns.Strided(5)
    output, log_sum_exp = stf.ops.packed_attention(packed, pattern, HEADS, 12)
    right = stf.ops.packed_attention_gradient(packed, pattern, HEADS, 12, output, log_sum_exp, upstream)
    other = stf.ops.packed_attention_gradient(packed, pattern, HEADS, 12, output, log_sum_exp + 1.0, upstream)
    values = slice(2 * HEADS * 12, None)
    np.testing.assert_allclose(other[..., values], right[..., values] / np.e, rtol=1e-4, atol=1e-6)


def test_second_derivatives_are_refused_and_the_log_sum_exp_has_none():
    packed, _, upstream = packed_and_apart("float32")
    pattern = stf.patterns.Local(5)
    with tf.GradientTape() as outer:
        outer.watch(packed)
        with tf.GradientTape(persistent=True) as inner:
            inner.watch(packed)
            output, log_sum_exp = stf.ops.packed_attention(packed, pattern, HEADS, 12)
        grad = inner.gradient(output, packed, upstream)
        assert inner.gradient(log_sum_exp, packed) is None
    with pytest.raises(LookupError, match="once"):
        outer.gradient(grad, packed)


@pytest.mark.parametrize(("heads", "key_dim"), [(7, 12), (0, 12), (HEADS, 10_000), (HEADS, -1)])
def test_widths_that_do_not_fit_are_refused(heads, key_dim):
    packed = packed_and_apart("float32")[0]
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="Received|key_dim|num_heads"):
        stf.ops.packed_attention(packed, stf.patterns.Local(5), heads, key_dim)
