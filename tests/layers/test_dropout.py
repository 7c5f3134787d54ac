"""Dropout's mask as a hash: its rate, and that nothing about it can be told from anything else about it."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from stf.layers import SparseResidualStack
from stf.layers.dropout import keep_mask, stateless_dropout
from stf.patterns import Local, Strided

SEEDS = [(0, 0), (7, 0), (7, 1), (7, 1 << 30), (-(2**31), 2**31 - 1), (1234567, -3)]
SHAPE = [300, 257]


def mask(seed, shape=SHAPE, rate=0.5):
    return keep_mask(shape, rate, tf.constant(seed, tf.int32)).numpy()


def assert_uncorrelated(a, b, sigmas=4):
    assert a.shape == b.shape
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < sigmas / a.size**0.5


@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_rate_is_what_was_asked_for(rate, seed):
    kept = mask(seed, rate=rate)
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 4 * sigma / kept.size**0.5
    for axis in (0, 1):  # no row and no column has a rate of its own
        off = np.abs(kept.mean(axis) - (1 - rate)) * kept.shape[axis] ** 0.5 / sigma
        assert off.max() < 5.5
        assert off.std() < 1.2


@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbouring_rows_columns_and_diagonals_are_uncorrelated(rate, seed):
    kept = mask(seed, rate=rate)
    for distance in (1, 2, 3, 16, 64, 128):
        assert_uncorrelated(kept[distance:], kept[:-distance])
        assert_uncorrelated(kept[:, distance:], kept[:, :-distance])
        assert_uncorrelated(kept[distance:, distance:], kept[:-distance, :-distance])


def test_neighbouring_seeds_are_uncorrelated():
    """Those of two blocks, of a block's two additions, of two calls, of the two words exchanged."""
    for first, second in [(0, 0), (7, 0), (123, 45), (2**31 - 8, 2**30 - 3)]:
        others = [(first + k, second) for k in (1, 2, 7)] + [(first, second + k) for k in (1, 2)]
        others += [(first, second ^ (1 << 30)), (first + 1, second + 1), (second, first + 1)]
        for other in others:
            assert_uncorrelated(mask((first, second)), mask(other))


def test_an_element_is_kept_by_the_rate_over_many_seeds():
    seeds = tf.stack([tf.range(20_000) // 100, tf.range(20_000) % 100], -1)
    draw = tf.function(
        lambda: tf.map_fn(lambda seed: keep_mask([3, 5], 0.25, seed), seeds, fn_output_signature=tf.bool)
    )
    kept = draw().numpy().reshape(20_000, 15)
    sigma = (0.25 * 0.75 / 20_000) ** 0.5
    assert np.abs(kept.mean(0) - 0.75).max() < 4 * sigma
    correlations = np.corrcoef(kept.T) - np.eye(15)
    assert np.abs(correlations).max() < 4.5 / 20_000**0.5


@pytest.mark.parametrize("shape", [[7], [4, 9], [2, 3, 5], [2, 0, 3]], ids=str)
def test_the_same_mask_with_and_without_a_compiler(shape):
    for seed, rate in itertools.product(SEEDS[:5], (0.1, 0.5)):
        compiled = tf.function(lambda seed: keep_mask(shape, rate, seed), jit_compile=True)
        np.testing.assert_array_equal(compiled(tf.constant(seed, tf.int32)), mask(seed, shape, rate))
    flat = mask((3, 4), [6, 5])
    np.testing.assert_array_equal(mask((3, 4), [2, 3, 5]).reshape(6, 5), flat)  # rows, however they are counted


@pytest.mark.parametrize("rate", [1 - 2.0**-20, 1 - 2.0**-32, 1 - 2.0**-40, np.nextafter(1.0, 0.0)])
def test_a_rate_close_to_1_keeps_next_to_nothing(rate):
    """It does not wrap around to keep everything."""
    assert mask((1, 2), [1000, 100], rate).mean() < 1e-4
    assert mask((1, 2), [1000, 100], 0.0).all()


def test_what_is_kept_is_divided_by_its_share_in_values_and_gradients():
    x, seed = tf.random.stateless_normal([40, 50], [1, 2]), tf.constant([5, 6])
    with tf.GradientTape() as tape:
        tape.watch(x)
        dropped = stateless_dropout(x, 0.2, seed)
    upstream = tf.random.stateless_normal([40, 50], [3, 4])
    kept = mask((5, 6), [40, 50], 0.2)
    np.testing.assert_allclose(dropped, np.where(kept, x / 0.8, 0), rtol=1e-6)
    np.testing.assert_allclose(tape.gradient(dropped, x, upstream), np.where(kept, upstream / 0.8, 0), rtol=1e-6)


def masks_of_a_stack(stack, training_calls):
    """What a stack of 4 blocks has kept, `[call, block, addition, row, column]`: read from the digits of outputs."""
    stack.build((None, None, 128))
    zeros = {name: 0 * value for name, value in stack.get_block_weights(0).items()}
    for k in range(4):  # each addition adds a power of 2 of its own wherever it is kept
        additions = {
            "attention_output_bias": np.full(128, 2.0 ** (2 * k)),
            "output_bias": np.full(128, 2.0 ** (2 * k + 1)),
        }
        stack.set_block_weights(k, zeros | additions)
    sums = np.stack([training_calls(tf.zeros([4, 100, 128])) for _ in range(3)])
    digits = np.round(sums.reshape(3, 400, 128) * (1 - stack.dropout)).astype(int)
    return np.stack([digits >> digit & 1 for digit in range(8)], 1).reshape(3, 4, 2, 400, 128)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_masks_of_blocks_additions_and_calls_are_independent(rate, jit_compile):
    stack = SparseResidualStack(4, [Local(3), Strided(4)], 1, 2, ff_dim=2, dropout=rate, recompute=True, seed=3)
    call = tf.function(lambda x: stack(x, training=True), jit_compile=jit_compile)
    kept = masks_of_a_stack(stack, call)
    sigma = (rate * (1 - rate) / kept[0, 0, 0].size) ** 0.5
    assert np.abs(kept.mean((-1, -2)) - (1 - rate)).max() < 4 * sigma
    correlations = np.corrcoef(kept.reshape(24, -1)) - np.eye(24)
    assert np.abs(correlations).max() < 4.5 / kept[0, 0, 0].size ** 0.5  # 276 pairs


def test_a_seed_repeats_the_masks_of_all_calls_and_another_has_others():
    def masks(seed):
        stack = SparseResidualStack(4, [Local(3)], 1, 2, ff_dim=2, dropout=0.5, seed=seed)
        return masks_of_a_stack(stack, lambda x: stack(x, training=True))

    first = masks(3)
    np.testing.assert_array_equal(masks(3), first)
    for other in (4, None):
        assert_uncorrelated(masks(other), first)


def test_halves_are_not_scaled_by_a_rounded_scale():
    x = tf.random.stateless_uniform([256, 256], [1, 2], 1, 2)
    for dtype in (tf.bfloat16, tf.float16):
        dropped = tf.cast(stateless_dropout(tf.cast(x, dtype), 0.1, tf.constant([3, 4])), tf.float64)
        kept = dropped > 0
        ratio = tf.boolean_mask(dropped / tf.cast(tf.cast(x, dtype), tf.float64), kept)
        assert float(tf.reduce_mean(ratio)) == pytest.approx(1 / 0.9, rel=2e-4)  # bfloat16's 1 / 0.9 is 1.6e-3 off
