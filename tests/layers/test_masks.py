"""Padding, Keras' masks and packed documents: what they leave out, and what cannot be expressed."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from layers.inputs import vectors

from stf import patterns
from stf.layers import FixedAttention, SparseAttention, SparseResidualBlock, StridedAttention


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


SIDES = np.arange(16) + np.array([[0], [-6], [6], [0]]), np.array([[16], [10], [16], [0]])  # none, left, right, all
USED = (SIDES[0] >= 0) & (SIDES[0] < SIDES[1])


@pytest.mark.parametrize("mode", ["", "float64", "xla"])
@pytest.mark.parametrize("name", ["strided", "block, recomputed"])
def test_padding_on_both_sides_is_exact(name, mode):
    """What is in use gives what it gives alone (strides and windows do not depend on where a sequence begins)."""
    if mode == "float64" and name != "strided":
        return
    layer = StridedAttention(2, 8, stride=4, dtype="float64") if mode == "float64" else ATTENTIONS[name]()
    x = tf.cast(vectors(batch=5, positions=16, width=16), layer.compute_dtype)
    mask = np.concatenate([USED, [[False] * 4 + [True] * 7 + [False] * 5]])
    layer.build(x.shape)
    run = tf.function(lambda x, mask: layer(x, mask=mask), jit_compile=mode == "xla")
    output = run(x, mask)
    assert np.isfinite(output).all()
    changed = run(tf.where(mask[:, :, None], x, -7), mask)
    np.testing.assert_array_equal(output[mask], changed[mask])
    for row, used in enumerate(mask):
        if used.any():
            alone = layer(x[row : row + 1, used.argmax() : used.argmax() + used.sum()])
            np.testing.assert_allclose(output[row][used], alone[0], rtol=1e-4, atol=1e-5)


def test_the_masks_mean_what_they_mean_in_keras():
    ours = SparseAttention(2, 8, patterns.Causal())
    theirs = keras.layers.MultiHeadAttention(2, 8)
    x = vectors(batch=4, positions=16, width=16)
    theirs.build(x.shape, x.shape)
    ours.build(x.shape)
    ours.set_weights(theirs.get_weights())
    right, left = np.arange(16) < np.array([[16], [11], [5], [1]]), np.arange(16) >= np.array([[0], [2], [7], [15]])
    for masks in (
        {"query_mask": left},
        {"query_mask": right, "value_mask": right},
        {"query_mask": right, "key_mask": right},
        {"value_mask": left},
        {"query_mask": right & left, "value_mask": right, "key_mask": left},
        {"query_mask": right, "value_mask": np.ones((4, 16), bool)},
        {"attention_mask": np.tril(np.ones((16, 16), bool))},
        {"attention_mask": np.tril(np.ones((4, 16, 16), int)), "value_mask": left},
        {"attention_mask": np.arange(16)[:, None] // 5 == np.arange(16) // 5},
    ):
        want = theirs(x, x, use_causal_mask=True, **masks)
        rows = np.ones((4, 16), bool)
        for name, mask in masks.items():  # Keras makes something of a query without a key
            rows &= mask if name != "attention_mask" else True
        got = ours(x, x, **masks)
        np.testing.assert_allclose(got[rows], want[rows], rtol=1e-4, atol=1e-5, err_msg=str(list(masks)))
        if "query_mask" in masks:  # others give 0
            assert not np.any(got.numpy()[~masks["query_mask"]] - ours.output_dense.bias)
        scores = ours(x, x, return_attention_scores=True, **masks)
        np.testing.assert_allclose(scores[0], got, rtol=1e-4, atol=1e-5)
        if "query_mask" not in masks or "value_mask" in masks:
            np.testing.assert_allclose(ours(x, **masks), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"attention_mask": np.eye(16, k=-1, dtype=bool)}, "`attention_mask` must leave each query"),
        ({"attention_mask": np.tril(np.ones((16, 16))) - np.eye(16, k=-3)}, "`attention_mask` must leave each query"),
        ({"attention_mask": (np.arange(16) < 9)[None, None]}, "`query_mask` \\(`value_mask`, `key_mask`\\)"),
        ({"value_mask": np.arange(16)[None] != 4}, "on the left and on the right alone"),
        ({"key_mask": np.arange(16)[None] < 4, "query_mask": np.arange(16)[None] < 5}, "`query_mask` must leave out"),
        ({"value_mask": np.arange(16)[None] < 4}, "`query_mask` must leave out"),  # Keras answers all queries
        (
            {"segment_ids": np.arange(16)[None] // 8, "value_mask": np.arange(16)[None] != 7},
            "`query_mask` must leave out .* \\(in each document\\)",
        ),
    ],
)
def test_masks_that_cannot_be_expressed_are_refused_by_name(masks, words):
    layer, x = SparseAttention(2, 8, patterns.Causal()), vectors(batch=2, positions=16, width=16)
    masks = {name: np.repeat(mask, 2, 0) if len(mask) == 1 else mask for name, mask in masks.items()}
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        layer(x, x, **masks)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Assert|must"):
        tf.function(lambda x: layer(x, x, **masks))(x)
    assert np.isnan(tf.function(lambda x: layer(x, x, **masks), jit_compile=True)(x)).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention_mask": np.ones((2, 2, 16, 16))}, r"attention_mask of shape \(2, 2, 16, 16\)"),
        ({"attention_mask": np.ones((3, 16, 16))}, r"attention_mask of shape \(3, 16, 16\)"),
        ({"attention_mask": np.ones((15, 16))}, r"attention_mask of shape \(15, 16\)"),
        ({"mask": np.ones((2, 15), bool)}, r"`query_mask` must have shape \(2, 16\). Received: shape \(2, 15\)"),
        ({"value_mask": np.ones(16, bool)}, r"`value_mask and key_mask` must have shape \(2, 16\)"),
        ({"segment_ids": np.ones((2, 17), int)}, r"`segment_ids` must have shape \(2, 16\)"),
        ({"document_starts": np.ones((3, 2), int)}, r"`document_starts` must have shape \(2, None\)"),
        ({"lengths": np.array([3.0, 20.0])}, "lengths must be integers. Received: lengths=<float"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(arguments, words):
    layer = SparseAttention(2, 8, patterns.Causal(), rotary=True, restart=True)
    for scores in (False, True):
        with pytest.raises(ValueError, match=words):
            layer(vectors(batch=2, positions=16, width=16), return_attention_scores=scores, **arguments)


def test_packed_documents_give_what_each_gives_alone():
    x = vectors(batch=2, positions=24, width=16)
    ids = np.array([[3] * 5 + [1] * 9 + [2] * 10, [0] * 24])
    starts = np.array([[0, 5, 14], [0, -1, -1]])
    for make in (
        lambda **more: FixedAttention(4, 8, stride=4, summary=1, num_key_value_heads=2, **more),
        lambda **more: StridedAttention(4, 8, stride=4, mode="multihead", attention_sink=True, **more),
    ):
        layer = make(restart=True, rotary=True, seed=1)
        layer.build(x.shape)
        if layer.sink is not None:
            layer.sink.assign([0.5, -1.0, 2.0, 0.0])
        packed = layer(x, segment_ids=ids)
        np.testing.assert_array_equal(layer(x, document_starts=starts), packed)
        alone = [layer(x[:1, begin:end]) for begin, end in ((0, 5), (5, 14), (14, 24))]
        np.testing.assert_allclose(packed[:1], tf.concat(alone, 1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(packed[1], layer(x)[1], rtol=1e-4, atol=1e-5)
        block = SparseResidualBlock(layer, recompute=True)
        streams = [block(x[:1, begin:end]) for begin, end in ((0, 5), (5, 14), (14, 24))]
        np.testing.assert_allclose(
            block(x, segment_ids=ids, training=True)[:1], tf.concat(streams, 1), rtol=1e-4, atol=1e-4
        )
    not_restarted = FixedAttention(4, 8, stride=4, summary=1, seed=1)
    alone = not_restarted(x[:1, 5:14])
    assert not np.allclose(not_restarted(x, segment_ids=ids)[0, 5:14], alone[0], atol=1e-3)
    inputs, numbers = keras.Input([24, 16]), keras.Input([24], dtype="int32")
    model = keras.Model([inputs, numbers], not_restarted(inputs, segment_ids=numbers))
    np.testing.assert_allclose(model([x, tf.constant(ids)]), not_restarted(x, segment_ids=ids), rtol=1e-5, atol=1e-6)


def test_a_document_that_a_mask_cuts_in_two_is_refused():
    layer, x = StridedAttention(2, 8, stride=4), vectors(batch=1, positions=12, width=16)
    ids = np.array([[0] * 6 + [1] * 6])
    layer(x, segment_ids=ids, mask=np.array([[False] + [True] * 4 + [False] * 2 + [True] * 4 + [False]]))
    for hole in (3, 8):
        with pytest.raises(tf.errors.InvalidArgumentError, match="on the left and on the right alone"):
            layer(x, segment_ids=ids, mask=np.arange(12)[None] != hole)


ATTENTIONS = {
    "strided": lambda: StridedAttention(2, 8, stride=4),
    "fixed": lambda: FixedAttention(2, 8, stride=4, summary=1),
    "half precision": lambda: StridedAttention(2, 8, stride=4, dtype="mixed_float16"),
    "block": lambda: SparseResidualBlock(StridedAttention(2, 8, stride=4), dropout=0.1),
    "block, recomputed": lambda: SparseResidualBlock(StridedAttention(2, 8, stride=4), dropout=0.1, recompute=True),
}
IDS = np.array([[0] * 6 + [1] * 4 + [0] + [1] * 5, [*range(1, 11)] + [0] * 6, [1, 0] * 8, [0] * 16], np.int32)
RIGHT = np.array([False, True, False, True])  # the others have holes


@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS)
def test_holes_in_a_mask_are_loud_with_and_without_a_compiler(make):
    model = keras.Sequential([keras.Input([16], dtype="int32"), keras.layers.Embedding(20, 16, mask_zero=True), make()])
    model.compile()
    for row in range(4):
        if RIGHT[row]:
            model.predict(IDS[row : row + 1], verbose=0)
            continue
        with pytest.raises(tf.errors.InvalidArgumentError, match="Assert"):
            model.predict(IDS[row : row + 1], verbose=0)
        with pytest.raises(tf.errors.InvalidArgumentError, match="on the left and on the right alone"):
            model(IDS[row : row + 1])
    want = model.predict(IDS[RIGHT], verbose=0)
    model.compile(jit_compile=True)
    got = model.predict(IDS, verbose=0)
    assert np.isnan(got[~RIGHT]).all()
    np.testing.assert_allclose(got[RIGHT], want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["strided", "block, recomputed"])
def test_a_compiled_step_has_no_gradient_that_seems_right_of_holes(name):
    layer, x = ATTENTIONS[name](), vectors(batch=4, positions=16, width=16)

    @tf.function(jit_compile=True)
    def step(mask):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(layer(x, mask=mask, training=True), tf.float32) ** 2)
        return tape.gradient(loss, [weight.value for weight in layer.trainable_weights])

    layer.build(x.shape)
    right = np.arange(16) < np.array([[16], [3], [0], [9]])
    assert all(np.isfinite(grad).all() for grad in step(right))
    assert all(np.isnan(grad).any() for grad in step(np.concatenate([right[:3], IDS[:1] != 0])))


def test_scores_of_a_refused_mask_are_not_numbers_when_compiled():
    layer, x = StridedAttention(2, 8, stride=4), vectors(batch=4, positions=16)
    run = tf.function(lambda mask: layer(x, mask=mask, return_attention_scores=True), jit_compile=True)
    output, scores = run(IDS != 0)
    assert np.isnan(output.numpy()[~RIGHT]).all() and np.isnan(scores.numpy()[~RIGHT]).all()
    assert np.isfinite(output.numpy()[RIGHT]).all() and np.isfinite(scores.numpy()[RIGHT]).all()


def test_masks_pass_through_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = keras.Input((8,), dtype="int32")
        x = keras.layers.Embedding(11, 16, mask_zero=True)(inputs)
        x = StridedAttention(2, 8, stride=4)(x)
        keras.Model(inputs, x).predict(np.array([[1, 2, 3, 4, 0, 0, 0, 0]]), verbose=0)
        assert x._keras_mask is not None
