"""The op's values and gradients against float64: patterns, dtypes, depths, lengths of sequences and of padding."""

import itertools

import numpy as np
import paper_sets as sets
import pytest

from ops.cases import HEADS, NAMES, case, check, run
from ops.float64_reference import DTYPES, random_inputs
from stf.patterns import Blocks, Local

DEPTHS = [(1, 1), (3, 17), (17, 3), (8, 8), (16, 32), (40, 72), (64, 64), (64, 128), (128, 128), (256, 256)]


def sizes(l):
    """Numbers of positions: none, one, about a stride, primes, about the kernels' tiles of 64, several strides."""
    return sorted({0, 1, 2, l - 1, l, l + 1, 2 * l, 31, 63, 64, 65, 4 * l + 3, 127, 131})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("l", [6, 13])
def test_every_pattern_at_every_length(name, l):
    for n in sizes(l):
        check(random_inputs(n, 2, n, HEADS, 8, 12), *case(name, l, n), f"n={n}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_in_every_dtype(name, dtype):
    l, n = 12, 101
    check(random_inputs(7, 2, n, HEADS, 24, 40, dtype), *case(name, l, n), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depths", DEPTHS)
def test_every_depth(depths, dtype):
    for name, n in (("merged_strided", 83), ("all_kinds", 75), ("multihead_fixed", 70)):
        check(random_inputs(n, 1, n, HEADS, *depths, dtype), *case(name, 11, n), f"{depths} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_lengths(name, dtype):
    l, n = 12, 97
    inputs = random_inputs(3, 6, n, HEADS, 5, 8, dtype, lengths=[n, 0, 1, l, 64, n - 1])
    check(inputs, *case(name, l, n), dtype)


@pytest.mark.parametrize("name", ["causal", "local", "strided", "merged_strided", "merged_fixed", "all_kinds"])
@pytest.mark.parametrize("l", [64, 100])
def test_strides_as_long_as_a_tile(name, l):
    n = 4 * l + 5
    check(random_inputs(l, 1, n, HEADS, 8, 8), *case(name, l, n))


LAYOUT = np.eye(9, k=-2, dtype=bool) | np.eye(9, k=-4, dtype=bool)


@pytest.mark.parametrize(
    ("pattern", "masks"),
    [
        # The window and the layout share one pair of a tile of 64 queries and a block of 16 keys.
        (Local(17) | Blocks(LAYOUT, 16), lambda n: (sets.local(n, 17), sets.blocks(n, LAYOUT, 16))),
        # The window leaves out one pair of the last tile's two queries and their first 64 keys.
        (Local(64), lambda n: (sets.local(n, 64),)),
    ],
    ids=["shared", "left out"],
)
def test_single_pairs_at_the_edges_of_tiles(pattern, masks):
    n = 130
    check(random_inputs(5, 1, n, HEADS, 8, 12), pattern, np.stack([sets.union(*masks(n))] * HEADS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_halves_of_whole_vectors_shorter_than_a_stride(name, dtype):
    """Rows of 32 halves, and fewer positions than a stride or a block: what is clipped to the sequence stays right."""
    for l, n in ((32, 27), (32, 31), (64, 40)):
        check(random_inputs(n, 2, n, HEADS, 32, 32, dtype), *case(name, l, n), f"l={l} n={n} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", [3, 16])
@pytest.mark.parametrize("batch", [1, 4])
def test_strided_sequences_few_and_many(l, batch, dtype):
    """The kernels take many short sequences whole, few long ones tile by tile: strides and batches on either side."""
    n = 211
    for name in ("strided", "two_strides", "merged_strided", "multihead_strided"):
        check(random_inputs(1, batch, n, HEADS, 8, 24, dtype), *case(name, l, n), f"{batch} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(scale, dtype):
    check(random_inputs(5, 1, 90, HEADS, 16, 8, dtype, scale=scale), *case("merged_fixed", 9, 90), f"scale={scale}")


def test_scores_far_apart():
    """Scores of several hundred: the softmax must not overflow, and one key takes all."""
    inputs = random_inputs(5, 1, 90, HEADS, 16, 8, scale=60.0)
    results = check(inputs, *case("merged_strided", 9, 90))
    assert all(np.isfinite(x).all() for x in results)
    assert abs(results.log_sum_exp).max() > 300


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("depths", [(0, 0), (0, 5), (5, 0), (4, 4)])
def test_sizes_of_zero(depths, batch, n):
    """No position, no sequence, or depth 0: shapes are right, and without a key depth all scores are 0."""
    for name in ("causal", "merged_strided", "all_kinds"):
        check(random_inputs(2, batch, n, HEADS, *depths), *case(name, 3, n), f"{depths} {batch} {n}")


def test_no_heads():
    for name in NAMES:
        inputs = random_inputs(2, 2, 10, 0, 4, 6)
        results = run(inputs, case(name, 3, 10)[0])
        assert [x.shape for x in results] == [
            (2, 10, 0, 6),
            (2, 0, 10),
            (2, 10, 0, 4),
            (2, 10, 0, 4),
            (2, 10, 0, 6),
        ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_sweep(name, dtype):
    """Every pattern, dtype, depth pair, number of positions, and padding, together."""
    for l in (5, 16, 64):
        for n, depths, ragged in itertools.product([*sizes(l), 193], DEPTHS, [False, True]):
            lengths = [n // 2, max(0, n - 1)] if ragged else None
            inputs = random_inputs([l, n], 2, n, HEADS, *depths, dtype, lengths=lengths)
            check(inputs, *case(name, l, n), f"n={n} {depths} {dtype} {lengths}")
