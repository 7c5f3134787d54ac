"""Evaluation: every token once, whatever the batches, the dtype policy and the context."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import stf
from stf.data import Stream, batches, windows


def make(**arguments):
    defaults = dict(
        length=24,
        position_shape=(6, 4),
        patterns=[stf.patterns.Local(4), stf.patterns.Strided(4)],
        num_blocks=2,
        num_heads=2,
        model_dim=16,
        vocab_size=32,
        seed=1,
    )
    model = stf.models.SparseTransformer(**(defaults | arguments))
    model.logits.kernel.assign(np.random.default_rng(0).normal(size=model.logits.kernel.shape))
    return model


def data(count, seed=0):
    return np.random.default_rng(seed).integers(0, 32, (count, 24)).astype(np.uint8)


def test_bits_are_the_mean_of_all_tokens_by_hand():
    model, x = make(), data(7)
    logits = model(x.astype("int32")).numpy().astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, x[..., None].astype(int), -1)[..., 0]
    found = stf.evaluation.evaluate(model, batches(x, 3), verbose=0)
    assert found.tokens == x.size == len(found.losses)
    assert found.bits == pytest.approx(nats.mean() / np.log(2), abs=1e-5)
    np.testing.assert_allclose(found.losses, nats.reshape(-1), atol=1e-4)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_neither_batch_size_nor_policy_changes_it(policy):
    expected = stf.evaluation.evaluate(make(), batches(data(7), 7), verbose=0).bits
    model = make(dtype=policy)
    model.set_weights(make().get_weights())
    exact = stf.evaluation.in_float32(model)
    assert exact.compute_dtype == "float32" and (exact is model) == (policy == "float32")
    for batch_size in (1, 2, 5):
        found = stf.evaluation.evaluate(exact, batches(data(7), batch_size), verbose=0)
        assert found.bits == pytest.approx(expected, abs=1e-4)
        assert found.tokens == 7 * 24


@pytest.mark.parametrize("context", [0, 7, 23])
def test_every_byte_of_a_stream_counts_once(context):
    model = make()
    stream = Stream.of([data(1).reshape(-1)[:10], np.tile(data(3, seed=2), 2).reshape(-1)[:77]])
    found = [
        stf.evaluation.evaluate(model, windows(stream, 24, batch_size, context), verbose=0) for batch_size in (1, 4)
    ]
    assert [each.tokens for each in found] == [87, 87]
    np.testing.assert_allclose(found[0].losses, found[1].losses, atol=1e-5)


def test_more_context_is_what_it_says():
    """The last token's loss is that of a window that ends with it."""
    model, stream = make(), data(4).reshape(-1)
    found = stf.evaluation.evaluate(model, windows(stream, 24, 2, context=23), verbose=0)
    last = stf.evaluation.evaluate(model, batches(stream[None, -24:], 1), verbose=0)
    assert found.losses[-1] == pytest.approx(last.losses[-1], abs=1e-5)


def test_nothing_that_counts_is_refused():
    with pytest.raises(ValueError, match="dataset"):
        stf.evaluation.evaluate(make(), batches(data(1), 1).take(0), verbose=0)


def test_agrees_with_keras():
    model, x = make(), data(6)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=[stf.training.BitsPerDim()]
    )
    theirs = model.evaluate(batches(x, 3), return_dict=True, verbose=0)["bits_per_dim"]
    assert stf.evaluation.evaluate(model, batches(x, 4), verbose=0).bits == pytest.approx(theirs, abs=1e-5)


def test_scores_are_the_losses_of_single_tokens():
    model = stf.models.SparseTransformer(12, (3, 4), [stf.patterns.Local(3)], 1, 2, 8, vocab_size=7, seed=1)
    model.logits.kernel.assign(np.random.default_rng(1).normal(size=(8, 7)))
    tokens = np.random.default_rng(0).integers(0, 7, (5, 12))
    found = model.score(tokens, batch_size=2)
    assert found.shape == (5, 12) and found.dtype == np.float32
    logits = model(tokens).numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = np.log(np.take_along_axis(probabilities, tokens[..., None], -1))[..., 0]
    np.testing.assert_allclose(found, want, rtol=1e-4)
    np.testing.assert_array_equal(model.score(tokens[3]), stf.evaluation.score(model, tokens[3:4])[0])
    assert model.score(tokens[:0]).shape == (0, 12)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [([[7]], "token 7"), ([[-1]], "token -1"), ([[0.5]], "float64"), ([[[1]]], r"shape \(1, 1, 1\)")],
)
def test_scores_of_what_is_no_token_are_refused(tokens, says):
    model = stf.models.SparseTransformer(12, (3, 4), [stf.patterns.Local(3)], 1, 2, 8, vocab_size=7)
    with pytest.raises(ValueError, match=says):
        model.score(tokens)


def gradient(model, tokens, counts):
    """Of the mean loss of the tokens that count, by Keras' own loss."""
    with tf.GradientTape() as tape:
        losses = keras.losses.sparse_categorical_crossentropy(tokens, model(tokens), from_logits=True)
        mean = tf.reduce_sum(losses * counts) / tf.reduce_sum(counts)
    return tape.gradient(mean, model.trainable_weights)


def test_dynamic_evaluation_scores_before_it_learns():
    """Two windows, by hand: the second is scored by weights that one step of the first has moved."""
    model, stream, rate, decay = make(dropout=0.5), data(2).reshape(-1), 0.02, 0.3
    windows_of_it = windows(stream, 24, 1)
    before = model.get_weights()
    scales = stf.evaluation.gradient_scales(model, windows_of_it, verbose=0)
    found = stf.evaluation.evaluate_dynamically(model, windows_of_it, scales, rate, decay, verbose=0)
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)

    copy = stf.models.SparseTransformer.from_config(model.get_config())
    copy.set_weights(model.get_weights())
    first, second = (stream[None, begin : begin + 24].astype("int32") for begin in (0, 24))
    counts = np.ones((1, 24), np.float32)
    gradients = [
        [tf.convert_to_tensor(g).numpy() for g in gradient(copy, tokens, counts)] for tokens in (first, second)
    ]
    for scale, a, b in zip(scales, *gradients, strict=True):
        np.testing.assert_allclose(scale, np.sqrt((a**2 + b**2) / 2), rtol=1e-3, atol=1e-6)
    want = [-copy.score(first)]
    mean = np.concatenate([scale.reshape(-1) for scale in scales]).mean()
    norms = [np.sqrt(sum(np.sum(np.square(x)) for x in each)) for each in (scales, gradients[0])]
    clip = min(1, norms[0] / norms[1])
    for weight, g, scale in zip(copy.trainable_variables, gradients[0], scales, strict=True):
        weight.assign(weight - rate * clip * g / (scale + 0.1 * mean))  # nothing goes back yet
    want.append(-copy.score(second))
    np.testing.assert_allclose(found.losses, np.concatenate(want, 1)[0], atol=2e-4)
    assert np.abs(found.losses - stf.evaluation.evaluate(model, windows_of_it, verbose=0).losses)[24:].max() > 0.01


def test_dynamic_evaluation_learns_what_repeats_and_goes_back_by_decay():
    model, stream = make(), np.tile(data(1).reshape(-1), 6)
    read = windows(stream, 24, 1, context=12)
    scales = stf.evaluation.gradient_scales(model, read, verbose=0)
    still = stf.evaluation.evaluate(model, read, verbose=0)
    bits = {
        (rate, decay): stf.evaluation.evaluate_dynamically(model, read, scales, rate, decay, verbose=0).bits
        for rate, decay in ((0, 0.5), (3e-3, 0.0), (3e-3, 1.0))
    }
    assert bits[0, 0.5] == pytest.approx(still.bits, abs=1e-4)
    assert bits[3e-3, 0.0] < bits[3e-3, 1.0] < still.bits


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"decay": 2.0}, "decay=2.0"),
        ({"scales": []}, "Received: 0"),
        ({"scales": [np.zeros(weight.shape) for weight in make().trainable_variables]}, "mean 0.0"),
    ],
)
def test_dynamic_evaluation_refuses_what_makes_no_sense(changed, says):
    model = make()
    arguments = {"scales": [np.ones(weight.shape) for weight in model.trainable_variables]} | changed
    with pytest.raises(ValueError, match=says):
        stf.evaluation.evaluate_dynamically(model, windows(data(2).reshape(-1), 24, 1), verbose=0, **arguments)
