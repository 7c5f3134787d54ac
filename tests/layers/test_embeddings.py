"""SequenceEmbedding: tables, shift, limits and initial values."""

import numpy as np
import pytest
import tensorflow as tf

from stf.layers import SequenceEmbedding, paper_initializer

POSITION_SHAPE = (2, 3, 2)


def tokens(positions=12):
    return np.random.default_rng(0).integers(0, 7, (3, positions)).astype("uint8")


def test_adds_token_and_place_then_shifts():
    layer = SequenceEmbedding(7, 5, POSITION_SHAPE)
    x = tokens()
    got = layer(x).numpy()
    table = layer.tokens.numpy()
    row, column, channel = (place.numpy() for place in layer.places)
    for b in range(3):
        np.testing.assert_array_equal(got[b, 0], layer.start.numpy())
        for t in range(1, 12):
            r, c, k = np.unravel_index(t - 1, POSITION_SHAPE)
            want = table[x[b, t - 1]] + row[r] + column[c] + channel[k]
            np.testing.assert_allclose(got[b, t], want, rtol=1e-5, atol=1e-6)


def test_one_step_is_one_position_of_the_call():
    layer = SequenceEmbedding(7, 5, POSITION_SHAPE)
    x = tokens()
    whole = layer(x)
    step = tf.function(layer.step)
    for t in range(12):
        before = x[:, t - 1].astype("int32")
        np.testing.assert_allclose(step(before, tf.constant(t)), whole[:, t : t + 1], atol=1e-6)


@pytest.mark.parametrize("positions", [0, 1, 5])
def test_takes_shorter_sequences_also_of_dynamic_length(positions):
    layer = SequenceEmbedding(7, 5, POSITION_SHAPE)
    whole = layer(tokens())
    dynamic = tf.function(layer, input_signature=[tf.TensorSpec([None, None], tf.uint8)])
    for call in (layer, dynamic):
        np.testing.assert_allclose(call(tokens()[:, :positions]), whole[:, :positions], rtol=1e-5, atol=1e-7)


def test_refuses_longer_sequences():
    layer = SequenceEmbedding(7, 5, POSITION_SHAPE)
    with pytest.raises(ValueError, match="12 positions"):
        layer(tokens(13))
    dynamic = tf.function(layer, input_signature=[tf.TensorSpec([None, None], tf.uint8)])
    with pytest.raises(tf.errors.InvalidArgumentError, match="12 positions"):
        dynamic(tokens(13))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(vocab_size=0), "`vocab_size` must.*vocab_size=0"),
        (dict(vocab_size=True), "`vocab_size` must.*vocab_size=True"),
        (dict(model_dim=0), "`model_dim` must.*model_dim=0"),
        (dict(model_dim=5.0), "`model_dim` must.*model_dim=5.0"),
        (dict(position_shape=(4, 3.0)), "`position_shape` must.*position_shape=3.0"),
        (dict(position_shape=()), r"`position_shape` must.*position_shape=\(\)"),
        (dict(position_shape=12), "`position_shape` must.*position_shape=12"),
        (dict(init="other"), "init='other'"),
        (dict(seed="1"), "seed='1'"),
    ],
)
def test_refuses_bad_arguments_by_name(arguments, says):
    with pytest.raises(ValueError, match=says):
        SequenceEmbedding(**dict(vocab_size=7, model_dim=5, position_shape=POSITION_SHAPE) | arguments)


@pytest.mark.parametrize("fan_in", [0, -1, 2.0, "a", None])
def test_the_papers_initializer_needs_inputs(fan_in):
    with pytest.raises(ValueError, match=f"fan_in={fan_in!r}"):
        paper_initializer(fan_in)


def test_initial_values_follow_the_paper():
    layer = SequenceEmbedding(400, 256, (400, 2), seed=1)
    layer(tokens())
    assert np.std(layer.tokens) == pytest.approx((0.125 / 256) ** 0.5, rel=0.02)
    assert np.std(layer.places[0]) == pytest.approx((0.125 / 512) ** 0.5, rel=0.02)
    assert not np.array_equal(layer.tokens, layer.places[0])
    stddev = {
        init: paper_initializer(256, 0.5, init).get_config()["stddev"]
        for init in ("released", "standard_deviation", "variance")
    }
    assert stddev == pytest.approx(
        {"released": 0.011049, "standard_deviation": 0.00390625, "variance": 0.0441942}, rel=1e-4
    )


def test_conditions_are_added_at_every_position():
    plain, told = (SequenceEmbedding(7, 4, (3, 2), seed=1, conditions=sizes) for sizes in ((), (3, 2)))
    tokens = np.array([[1, 2, 3, 4, 5, 6]] * 2)
    conditions = np.array([[2, 1], [0, 0]])
    tables = [plain(tokens), told(tokens, conditions)]
    first, second = (table.numpy() for table in told.condition_tables)
    np.testing.assert_allclose(tables[1][0] - tables[0][0], np.tile(first[2] + second[1], (6, 1)), atol=1e-6)
    np.testing.assert_allclose(told(tokens) - plain(tokens), np.tile(first[0] + second[0], (2, 6, 1)), atol=1e-6)
    for position in range(6):
        step = told.step(tokens[:, position - 1], position, conditions)
        np.testing.assert_allclose(step[:, 0], tables[1][:, position], atol=1e-6)
