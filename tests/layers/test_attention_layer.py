"""SparseAttention beside Keras' own attention, its masks, scores and refusals."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from stf import patterns
from stf.layers import FixedAttention, SparseAttention, SparseResidualBlock, StridedAttention

RANDOM = np.random.default_rng(0)


def vectors(batch=2, positions=13, width=8):
    return tf.constant(RANDOM.normal(size=(batch, positions, width)), tf.float32)


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


def test_padding_by_lengths_or_mask_changes_nothing_before_it():
    layer = StridedAttention(2, 4, 4)
    x = vectors(batch=3)
    lengths = np.array([13, 6, 0])
    mask = np.arange(13) < lengths[:, None]
    got = layer(x, lengths=lengths)
    alone = layer(x[1:2, :6])
    np.testing.assert_allclose(got[1:2, :6], alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[0], layer(x)[0])
    for masked in (layer(x, mask=mask), layer(x, x, query_mask=mask)):
        np.testing.assert_array_equal(masked, got)
    through_keras = keras.layers.Masking()(tf.where(mask[:, :, None], x, 0))
    output = layer(through_keras)
    np.testing.assert_allclose(output[mask], got[mask], rtol=1e-5, atol=1e-6)
    scores = layer(x, lengths=lengths, return_attention_scores=True)[1]
    assert (scores.numpy()[1, :, 6:] == 0).all() and (scores.numpy()[1, :, :, 6:] == 0).all()


def test_padding_on_the_left_is_refused():
    mask = np.arange(13)[None] >= 4
    with pytest.raises(tf.errors.InvalidArgumentError, match="on the right"):
        StridedAttention(2, 4, 4)(vectors(batch=1), mask=mask)


ATTENTIONS = {
    "strided": lambda: StridedAttention(2, 8, stride=4),
    "fixed": lambda: FixedAttention(2, 8, stride=4, summary=1),
    "half precision": lambda: StridedAttention(2, 8, stride=4, dtype="mixed_float16"),
    "block": lambda: SparseResidualBlock(StridedAttention(2, 8, stride=4), dropout=0.1),
    "block, recomputed": lambda: SparseResidualBlock(StridedAttention(2, 8, stride=4), dropout=0.1, recompute=True),
}
IDS = np.array([[0] * 6 + [*range(1, 11)], [*range(1, 11)] + [0] * 6, [1, 0] * 8, [0] * 16], np.int32)
RIGHT = np.array([False, True, False, True])


@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS)
def test_padding_that_is_not_on_the_right_is_loud_with_and_without_a_compiler(make):
    model = keras.Sequential([keras.Input([16], dtype="int32"), keras.layers.Embedding(20, 16, mask_zero=True), make()])
    model.compile()
    for row in range(4):
        if RIGHT[row]:
            model.predict(IDS[row : row + 1], verbose=0)
            continue
        with pytest.raises(tf.errors.InvalidArgumentError, match="Assert"):
            model.predict(IDS[row : row + 1], verbose=0)
        with pytest.raises(tf.errors.InvalidArgumentError, match="on the right"):
            model(IDS[row : row + 1])
    want = model.predict(IDS[RIGHT], verbose=0)
    model.compile(jit_compile=True)
    got = model.predict(IDS, verbose=0)
    assert np.isnan(got[~RIGHT]).all()
    np.testing.assert_allclose(got[RIGHT], want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["strided", "block, recomputed"])
def test_a_compiled_step_has_no_gradient_that_seems_right_of_padding_on_the_left(name):
    layer, x = ATTENTIONS[name](), vectors(batch=4, positions=16, width=16)

    @tf.function(jit_compile=True)
    def step(mask):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(layer(x, mask=mask, training=True), tf.float32) ** 2)
        return tape.gradient(loss, [weight.value for weight in layer.trainable_weights])

    layer.build(x.shape)
    right = np.arange(16) < np.array([[16], [3], [0], [9]])
    assert all(np.isfinite(grad).all() for grad in step(right))
    assert all(np.isnan(grad).any() for grad in step(np.concatenate([right[:3], ~right[1:2]])))


def test_scores_of_a_refused_mask_are_not_numbers_when_compiled():
    layer, x = StridedAttention(2, 8, stride=4), vectors(batch=4, positions=16)
    run = tf.function(lambda mask: layer(x, mask=mask, return_attention_scores=True), jit_compile=True)
    output, scores = run(IDS != 0)
    assert np.isnan(output.numpy()[~RIGHT]).all() and np.isnan(scores.numpy()[~RIGHT]).all()
    assert np.isfinite(output.numpy()[RIGHT]).all() and np.isfinite(scores.numpy()[RIGHT]).all()


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


def test_masks_pass_through_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = keras.Input((8,), dtype="int32")
        x = keras.layers.Embedding(11, 16, mask_zero=True)(inputs)
        x = StridedAttention(2, 8, stride=4)(x)
        keras.Model(inputs, x).predict(np.array([[1, 2, 3, 4, 0, 0, 0, 0]]), verbose=0)
        assert x._keras_mask is not None
