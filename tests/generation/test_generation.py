"""Step-by-step logits equal the teacher-forced ones, for every pattern and policy; draws; refusals."""

import numpy as np
import pytest
import tensorflow as tf

import stf
from stf.generation import Decoder, draw
from stf.models import SparseTransformer

P = stf.patterns
N = 29
PATTERNS = [
    P.Causal(),
    P.Local(3),
    P.Strided(5),
    P.OwnBlock(4),
    P.Summary(5, 2),
    P.Fixed(5, 2),
    P.Local(4) | P.Strided(4),
    P.PerHead([P.Local(2), P.Strided(6)]),
    P.Blocks(np.random.default_rng(0).random((2, 8, 8)) < 0.6, 4),
]


def make(patterns, **arguments):
    model = SparseTransformer(
        length=N,
        position_shape=(8, 4),
        patterns=patterns,
        num_blocks=len(patterns) + 1,
        num_heads=2,
        model_dim=16,
        key_dim=6,
        value_dim=5,
        vocab_size=13,
        seed=3,
        **arguments,
    )
    random = np.random.default_rng(1)
    for weight in model.trainable_variables:  # as after training: nothing is 0 or 1
        weight.assign(weight.numpy() + 0.3 * random.normal(size=weight.shape))
    return model


def tokens(batch=2):
    return np.random.default_rng(0).integers(0, 13, (batch, N)).astype("int32")


def stepwise(model, x):
    decoder = Decoder(model, len(x), x.shape[1])
    state, found = decoder.zeros(), []
    for t in range(x.shape[1]):
        logits, state = decoder.step(state, x[:, t - 1], t)
        found.append(logits.numpy())
    return np.stack(found, axis=1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_steps_equal_the_whole_sequence(pattern):
    model = make([pattern])
    want = model(tokens()).numpy()
    np.testing.assert_allclose(stepwise(model, tokens()), want, atol=2e-6 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(
    ("policy", "unit"),
    [("mixed_bfloat16", 2.0**-8), pytest.param("mixed_float16", 2.0**-11, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_steps_are_as_near_the_truth_as_the_whole_sequence_in_half_precision(pattern, policy, unit):
    exact, model = make([pattern], dtype="float32"), make([pattern], dtype=policy)
    model.set_weights(exact.get_weights())
    truth = exact(tokens()).numpy()
    error = np.abs(stepwise(model, tokens()) - truth).max()
    allowed = np.abs(model(tokens()).numpy() - truth).max()
    assert error <= 2 * allowed + unit * np.abs(truth).max()


def test_blocks_of_several_patterns():
    model = make(PATTERNS[1:4])
    want = model(tokens()).numpy()
    np.testing.assert_allclose(stepwise(model, tokens()), want, atol=2e-6 * np.abs(want).max(), rtol=0)


def test_samples_repeat_by_seed_and_keep_the_prefix():
    model, x = make(PATTERNS[6:7]), tokens(batch=3)
    first = model.generate(prefix=x[:, :10], seed=5, verbose=0)
    assert first.shape == (3, N) and first.dtype == np.int32
    np.testing.assert_array_equal(first[:, :10], x[:, :10])
    np.testing.assert_array_equal(model.generate(prefix=x[:, :10], seed=5, verbose=0), first)
    assert not np.array_equal(model.generate(prefix=x[:, :10], seed=6, verbose=0), first)
    assert model.generate(batch_size=2, length=4, verbose=0).shape == (2, 4)


def test_at_temperature_0_each_token_is_the_likeliest():
    model = make(PATTERNS[6:7])
    sample = model.generate(temperature=0, verbose=0)
    np.testing.assert_array_equal(sample, np.argmax(model(sample), -1))
    np.testing.assert_array_equal(model.generate(top_k=1, verbose=0), sample)


def test_samples_follow_the_models_distribution():
    """Chi-squared of the first token of many samples."""
    model = make(PATTERNS[:1])
    probabilities = tf.nn.softmax(model(tokens())[0, 0] / 2).numpy()
    drawn = model.generate(batch_size=20_000, temperature=2.0, length=1, seed=1, verbose=0)[:, 0]
    expected = 20_000 * probabilities
    statistic = np.sum((np.bincount(drawn, minlength=13) - expected) ** 2 / expected)
    assert statistic < 32.9  # 12 degrees of freedom: exceeded once in a thousand


def test_top_p_draws_from_the_fewest_that_add_up():
    logits = tf.math.log([[0.5, 0.2, 0.2, 0.1]])
    for top_p, allowed in ((0.4, {0}), (0.5, {0}), (0.6, {0, 1, 2}), (0.91, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})):
        drawn = {int(draw(logits, 1.0, [0, t], top_p=top_p)[0]) for t in range(80)}
        assert drawn == allowed, top_p
    logits = tf.math.log([[0.1, 0.4, 0.3, 0.2]])
    assert {int(draw(logits, 1.0, [0, t], top_k=2, top_p=0.99)[0]) for t in range(80)} == {1, 2}


def test_top_k_draws_from_the_likeliest_alone():
    logits = tf.random.stateless_normal([1, 50], [1, 2])
    likeliest = set(tf.math.top_k(logits, 3).indices.numpy()[0])
    drawn = {int(draw(logits, 5.0, [0, t], top_k=3)[0]) for t in range(60)}
    assert drawn == likeliest


@pytest.mark.parametrize("arguments", [{}, dict(top_k=20), dict(top_p=0.7)], ids=str)
def test_draws_are_the_same_compiled_or_not(arguments):
    logits = tf.random.stateless_normal([500, 50], [1, 2]) * 3
    compiled = tf.function(lambda seed: draw(logits, 0.8, seed, **arguments), jit_compile=True)
    for seed in ([0, 0], [2**32 - 1, 7], [5, 2**31 - 1]):
        np.testing.assert_array_equal(draw(logits, 0.8, seed, **arguments), compiled(tf.constant(seed, tf.int64)))
    first = draw(logits[:100], 0.8, [3, 4], **arguments)  # a row's draw does not depend on how many there are
    np.testing.assert_array_equal(first, draw(logits, 0.8, [3, 4], **arguments)[:100])


def test_draws_of_rows_positions_and_seeds_are_independent():
    """Chi-squared over pairs of draws from 8 tokens: of one row at the next position, the next row, another seed."""
    logits = tf.math.log(tf.constant([[1.0, 2, 3, 4, 5, 6, 7, 8]]) / 36)
    rows = tf.tile(logits, [300, 1])
    compiled = tf.function(lambda seed, position: draw(rows, 1.0, tf.stack([seed, position])), jit_compile=True)
    positions = [tf.constant(t, tf.int64) for t in range(200)]
    drawn = {
        seed: np.stack([compiled(tf.constant(seed, tf.int64), t) for t in positions]) for seed in (5, 6, 5 + 2**31)
    }
    chances = np.arange(1, 9) / 36
    first = drawn[5]
    others = (first[::2], first[1::2]), (first[:, ::2], first[:, 1::2]), (first, drawn[6]), (first, drawn[5 + 2**31])
    for a, b in others:
        pairs = np.bincount((8 * a + b).reshape(-1), minlength=64)
        expected = a.size * np.outer(chances, chances).reshape(-1)
        assert np.sum((pairs - expected) ** 2 / expected) < 103.4  # 63 degrees of freedom: once in a thousand


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(temperature=-1), "temperature=-1"),
        (dict(temperature=np.nan), "temperature=nan"),
        (dict(temperature="1"), "temperature='1'"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_k=2.0), "top_k=2.0"),
        (dict(top_k=14), "top_k=14"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p="1"), "top_p='1'"),
        (dict(length=N + 1), f"length={N + 1}"),
        (dict(length=-1), "length=-1"),
        (dict(length=3.0), "length=3.0"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(batch_size="2"), "batch_size='2'"),
        (dict(seed=2**32), "seed=4294967296"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed=1.5), "seed=1.5"),
        (dict(prefix=np.zeros((1, N + 1))), "prefix of shape"),
        (dict(prefix=np.full((1, 2), 13)), "tokens from 0 to 12.*token 13"),
        (dict(prefix=[[2**40]]), "tokens from 0 to 12.*token 1099511627776"),
        (dict(prefix=[[0.5]]), "integer tokens.*float64"),
        (dict(prefix=[[None]]), "integer tokens.*None"),
        (dict(prefix=[["1"]]), "integer tokens.*'1'"),
        (dict(prefix=[[True]]), "integer tokens.*bool"),
    ],
)
def test_refuses_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        make(PATTERNS[:1]).generate(verbose=0, **arguments)


def test_seeds_of_32_bits_and_numpys_numbers_draw():
    model = make(PATTERNS[:1])
    arguments = dict(batch_size=np.int64(2), length=np.int64(5), top_k=np.int64(9), top_p=np.float32(0.9), verbose=0)
    drawn = [model.generate(seed=seed, **arguments) for seed in (np.int64(7), 7, 2**31, 2**32 - 1)]
    np.testing.assert_array_equal(*drawn[:2])
    assert len({tokens.tobytes() for tokens in drawn}) == 3
    assert model.generate(prefix=[[]], length=3, verbose=0).shape == (1, 3)


def test_decoder_refuses_positions_outside_its_room():
    model = make(PATTERNS[:1])
    for length in (0, 4.0, N + 1):
        with pytest.raises(ValueError, match=f"length={length}"):
            Decoder(model, 1, length)
    decoder = Decoder(model, 1, 4)
    with pytest.raises(ValueError, match="position=4"):
        decoder.step(decoder.zeros(), [0], 4)
    for position, count in ((4, 1), (3, 2), (-1, 1), (0, 0), (0, 65)):
        with pytest.raises(ValueError, match=f"position={position}, count={count}"):
            decoder.draw(decoder.zeros(), [0], [False], position, count, 1)
