"""SparseAttention beside Keras' own attention, its masks, scores and refusals."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import stf
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
