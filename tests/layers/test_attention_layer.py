"""SparseAttention beside Keras' own attention: patterns, heads, sinks, scores and refusals."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from layers.inputs import vectors

from stf import patterns
from stf.layers import FixedAttention, SparseAttention, StridedAttention

RANDOM = np.random.default_rng(0)

PATTERNS = [
    patterns.Causal(),
    patterns.Local(3),
    patterns.Strided(4),
    patterns.OwnBlock(4),
    patterns.Summary(4, 2),
    patterns.Fixed(4, 1),
    patterns.Local(4) | patterns.Strided(4),
    patterns.PerHead([patterns.Local(2), patterns.Causal()]),
    patterns.Blocks(RANDOM.random((2, 4, 4)) < 0.7, 4),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_keras_attention_under_the_patterns_mask(pattern):
    x = vectors()
    ours = SparseAttention(2, 4, pattern, value_dim=3, bias_initializer="normal", seed=1)
    theirs = keras.layers.MultiHeadAttention(2, 4, value_dim=3)
    ours(x)
    theirs(x, x)
    theirs.set_weights(ours.get_weights())
    mask = np.stack([pattern.mask(13, head) for head in range(2)])
    some = mask.any(-1).all(0)  # Keras makes something of a row without a key
    want, want_scores = theirs(x, x, attention_mask=mask[None], return_attention_scores=True)
    got, scores = ours(x, return_attention_scores=True)
    for output in (got, ours(x), ours(x, x, x), tf.function(ours)(x)):
        np.testing.assert_allclose(output.numpy()[:, some], want.numpy()[:, some], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.numpy()[:, :, some], want_scores.numpy()[:, :, some], rtol=1e-4, atol=1e-5)
    assert (scores.numpy()[:, ~mask] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_attention_weights_are_the_scores_of_the_patterns_own_keys(pattern):
    x = vectors()
    layer = SparseAttention(2, 4, pattern)
    _, scores = layer(x, return_attention_scores=True)
    maps = layer.attention_weights(x, [0, 5, 12])
    assert len(maps) == 2
    for head, of_head in enumerate(maps):
        for position, (keys, weights) in zip([0, 5, 12], of_head, strict=True):
            np.testing.assert_array_equal(keys, pattern.keys(position, head))
            np.testing.assert_allclose(weights, scores.numpy()[:, head, position][:, keys], rtol=1e-4, atol=1e-6)


def test_modes_are_the_papers_three_integrations():
    def of(layer, head):
        return layer.pattern.for_head(head)

    local, strided = patterns.Local(4), patterns.Strided(4)
    assert of(StridedAttention(2, 4, 4), 1) == local | strided
    assert of(StridedAttention(2, 4, 4, mode="local"), 1) == local
    assert of(StridedAttention(2, 4, 4, mode="strided"), 0) == strided
    both = StridedAttention(2, 4, 4, mode="multihead")
    assert (of(both, 0), of(both, 1)) == (local, strided)
    assert of(FixedAttention(2, 4, 4, 2), 1) == patterns.Fixed(4, 2, sub_block=1)
    assert of(FixedAttention(2, 4, 4, 2, mode="block"), 1) == patterns.OwnBlock(4)
    assert of(FixedAttention(2, 4, 4, 2, mode="summary"), 1) == patterns.Summary(4, 2, 1)
    both = FixedAttention(2, 4, 4, 2, mode="multihead")
    assert (of(both, 0), of(both, 1)) == (patterns.OwnBlock(4), patterns.Summary(4, 2, 1))


@pytest.mark.parametrize("key_heads", [1, 2])
def test_shared_heads_equal_keras_grouped_query_attention(key_heads):
    ours = SparseAttention(4, 8, patterns.Local(5), num_key_value_heads=key_heads)
    theirs = keras.layers.GroupQueryAttention(8, 4, key_heads)
    x = vectors(batch=2, positions=16, width=32)
    theirs.build(x.shape, x.shape)
    ours.build(x.shape)
    ours.set_weights(theirs.get_weights())
    mask = np.stack([patterns.Local(5).mask(16)] * 2)
    np.testing.assert_allclose(ours(x), theirs(x, x, attention_mask=mask), rtol=1e-4, atol=1e-5)
    heads = ours.attention_weights(x, [9])
    np.testing.assert_allclose(
        heads[3][0][1], ours(x, return_attention_scores=True)[1][:, 3, 9, heads[3][0][0][0] : 10], rtol=1e-4, atol=1e-6
    )


def test_a_sink_takes_weight_and_learns():
    layer, x = SparseAttention(2, 8, patterns.Local(5), attention_sink=True), vectors(batch=2, positions=16, width=16)
    layer(x)
    plain = SparseAttention(2, 8, patterns.Local(5))
    plain.build(x.shape)
    plain.set_weights([weight for weight in layer.get_weights() if weight.shape != (2,)])
    layer.sink.assign([-np.inf, -np.inf])
    np.testing.assert_array_equal(layer(x), plain(x))
    layer.sink.assign([20.0, -1.0])
    _, scores = layer(x, return_attention_scores=True)
    assert tf.reduce_max(scores[:, 0]) < 1e-5 and 0.5 < float(tf.reduce_sum(scores[0, 1, 9])) < 1
    assert np.isclose(layer.attention_weights(x, [9])[1][0][1][0].sum(), tf.reduce_sum(scores[0, 1, 9]), atol=1e-5)
    layer.sink.assign([0.3, -0.4])
    step = 1e-2
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x) ** 2)
    grad = tape.gradient(loss, layer.sink.value)
    for head in range(2):
        losses = []
        for sign in (1, -1):
            layer.sink.assign(np.float32([0.3, -0.4]) + sign * step * np.eye(2, dtype=np.float32)[head])
            losses.append(float(tf.reduce_sum(tf.cast(layer(x), tf.float64) ** 2)))
        np.testing.assert_allclose(grad[head], (losses[0] - losses[1]) / (2 * step), rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_key_value_heads": 3}, "`num_key_value_heads` must divide num_heads=4. Received: num_key_value_heads=3"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` must be an int, 1 or more"),
        ({"rotary": True, "key_dim": 5}, "`key_dim` must be even where rotary=True. Received: key_dim=5"),
        ({"rotary_base": 0}, "`rotary_base` must be above 0. Received: rotary_base=0"),
        ({"rotary_scaling": -1.0}, "`rotary_scaling` must be above 0"),
    ],
)
def test_features_refuse(arguments, words):
    with pytest.raises(ValueError, match=words):
        SparseAttention(**{"num_heads": 4, "key_dim": 8, "pattern": patterns.Causal()} | arguments)


def test_output_shape_of_several_axes_and_dynamic_shapes():
    layer = SparseAttention(2, 4, patterns.Local(3), output_shape=(5, 6))
    assert layer(vectors()).shape == (2, 13, 5, 6)
    assert layer(keras.Input((None, 8))).shape == (None, None, 5, 6)
    dynamic = tf.function(layer, input_signature=[tf.TensorSpec([None, None, 8])])
    np.testing.assert_allclose(dynamic(vectors(3, 9)).shape, [3, 9, 5, 6])


def test_seed_fixes_each_kernel_and_makes_no_two_equal():
    first, second = (StridedAttention(2, 4, 4, seed=3) for _ in range(2))
    x = vectors()
    np.testing.assert_array_equal(first(x), second(x))
    assert not np.array_equal(first.query_dense.kernel, first.key_dense.kernel)
    other = StridedAttention(2, 4, 4, kernel_initializer=keras.initializers.HeNormal(), seed=4)
    assert not np.array_equal(other(x), first(x))


def test_output_initializer_is_the_output_kernels_alone():
    layer = StridedAttention(2, 4, 4, output_initializer="zeros")
    assert (layer(vectors()).numpy() == 0).all()
    assert np.any(layer.query_dense.kernel)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(num_heads=0), "num_heads=0"),
        (dict(key_dim=2.0), "key_dim=2.0"),
        (dict(value_dim=-1), "value_dim=-1"),
        (dict(value_dim=0), "value_dim=0"),
        (dict(output_shape=(1, 1, 1, 1)), "output_shape"),
        (dict(output_shape=3.0), "output_shape=3.0"),
        (dict(output_shape=(2, 0)), "output_shape=0"),
        (dict(output_shape=()), r"output_shape=\(\)"),
        (dict(seed=1.5), "seed=1.5"),
        (dict(seed=2**32), "seed=4294967296"),
        (dict(pattern="strided"), "pattern='strided'"),
        (dict(pattern=patterns.Blocks(np.ones((3, 2, 2), bool), 4)), r"num_heads=2|\(3, 2, 2\)"),
    ],
)
def test_refuses_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        SparseAttention(**{"num_heads": 2, "key_dim": 4, "pattern": PATTERNS[0], **arguments})


def test_refuses_bad_calls():
    layer = StridedAttention(2, 4, 4)
    with pytest.raises(ValueError, match="use_causal_mask=False"):
        layer(vectors(), use_causal_mask=False)
    with pytest.raises(ValueError, match="Received shapes"):
        layer(vectors(positions=5), vectors(positions=6))
    with pytest.raises(ValueError, match="mode='both'"):
        StridedAttention(2, 4, 4, mode="both")
    with pytest.raises(ValueError, match="mode='both'"):
        FixedAttention(2, 4, 4, 1, mode="both")


@pytest.mark.parametrize("value", [8.0, "8", 0, -1, None, True])
def test_the_stride_is_refused_by_its_own_name(value):
    for mode in ("merged", "local", "strided", "multihead"):
        with pytest.raises(ValueError, match=f"`stride` must.*Received: stride={value!r}"):
            StridedAttention(2, 4, value, mode)
    with pytest.raises(ValueError, match=f"`stride` must.*Received: stride={value!r}"):
        FixedAttention(2, 4, value, 1)
    with pytest.raises(ValueError, match=f"`summary` must.*Received: summary={value!r}"):
        FixedAttention(2, 4, 8, value)
