"""Rotary positions: distances alone, exact far on and in half precision, and a step of decoding."""

import numpy as np
import pytest
import tensorflow as tf
from layers.inputs import vectors

import stf
from stf import patterns
from stf.layers import SparseAttention


def test_rotary_scores_depend_on_distances_alone_and_decoding_goes_on():
    layer = SparseAttention(
        4,
        8,
        patterns.Local(6),
        rotary=True,
        num_key_value_heads=2,
        attention_sink=True,
        bias_initializer="normal",
        seed=0,
    )
    layer.build([2, 20, 16])
    layer.sink.assign([0.5, -1.0, 2.0, 0.0])
    x = vectors(batch=2, positions=20, width=16)
    scores = layer(x, return_attention_scores=True)[1]
    moved = layer(tf.concat([x[:, :7] * 3, x], 1), return_attention_scores=True)[1]
    np.testing.assert_allclose(scores[:, :, 8:, 8:], moved[:, :, 15:, 15:], rtol=1e-4, atol=1e-6)
    want = layer(x)
    query, key, value = layer.project(x)
    cache = stf.generation.KeyValueCache(layer.pattern, 4, 20, 8, 8, num_key_value_heads=2)
    state = cache.zeros(2)
    for position in range(20):
        one = [part[:, position : position + 1] for part in (query, key)]
        turned, turned_key = layer.with_positions(*one, positions=[position])
        state = cache.write(state, turned_key[:, 0], value[:, position], position)
        heads = cache.attend(state, turned[:, 0], position, sink=layer.sink)
        np.testing.assert_allclose(layer.combine(heads[:, None])[:, 0], want[:, position], rtol=1e-4, atol=1e-5)


def test_rotary_embedding_is_exact_a_million_positions_on():
    rotary = stf.layers.RotaryEmbedding(base=500.0, scaling=2.0)
    x = vectors(batch=1, positions=3, width=16)[:, :, None]
    positions = np.array([5, 999_999, 1_000_001])
    angle = positions[:, None] / 2 * 500.0 ** (-np.arange(8) / 8)
    first, second = np.split(np.array(x, np.float64)[0, :, 0], 2, -1)
    want = np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
    )
    np.testing.assert_allclose(rotary(x, positions=positions)[0, :, 0], want, rtol=0, atol=3e-6)
    assert stf.layers.RotaryEmbedding.from_config(rotary.get_config()).base == 500.0


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_rotary_positions_are_not_rounded_in_half_precision(policy):
    half, exact = (
        SparseAttention(2, 16, patterns.Local(9), rotary=True, restart=True, dtype=dtype, seed=1)
        for dtype in (policy, "float32")
    )
    x = 3 * vectors(batch=1, positions=3000, width=16)
    ids = np.repeat([0, 1, 2], [700, 2200, 100])[None]
    want, alone = (
        tf.concat([layer(x[:, begin:end]) for begin, end in ((0, 700), (700, 2900), (2900, 3000))], 1)
        for layer in (exact, half)
    )
    rounding = np.abs(want - tf.cast(alone, tf.float32)).max()
    assert np.abs(want - tf.cast(half(x, segment_ids=ids), tf.float32)).max() <= 2 * rounding
    rotary = stf.layers.RotaryEmbedding(dtype=policy)
    x = vectors(batch=1, positions=1, width=16)
    for position in (3001, 70_000, 999_999):
        turned = rotary(x, positions=[position])
        assert turned.dtype == rotary.compute_dtype
        np.testing.assert_array_equal(turned, rotary(x, positions=[float(position)]))
        np.testing.assert_array_equal(turned, rotary(x, positions=np.array([[position]], np.float64)))


@pytest.mark.parametrize(
    ("inputs", "positions", "words"),
    [
        ((1, 8, 2, 4), np.arange(3), r"`positions` must be .* with 8 positions. Received: positions of shape \(3,\)"),
        ((1, 8, 2, 4), 5, "`positions` must be"),
        ((1, 8, 2, 5), None, r"`inputs` must be floats .* even depth. Received: inputs of dtype float32, shape"),
        ((8, 4), None, "`inputs` must be floats"),
    ],
)
def test_rotary_refuses(inputs, positions, words):
    with pytest.raises(ValueError, match=words):
        stf.layers.RotaryEmbedding()(tf.zeros(inputs), positions=positions)
    with pytest.raises(ValueError, match="Received: inputs of dtype int32"):
        stf.layers.RotaryEmbedding()(tf.zeros([1, 8, 4], tf.int32))
