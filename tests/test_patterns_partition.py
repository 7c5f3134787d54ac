"""How patterns are divided among devices: the method of each, and what each device then reads."""

import numpy as np
import pytest

from stf import patterns as P
from stf.patterns.partition import (
    Columns,
    Halo,
    Heads,
    Remainders,
    Sizes,
    partition,
    positions_of_device,
)

BANDED = np.tril(np.ones((8, 8), bool)) & ~np.tril(np.ones((8, 8), bool), -2)
FIRST = np.tril(np.ones((8, 8), bool)) & (np.arange(8) == 0)
CASES = [
    (P.Local(8), Halo, 96),
    (P.OwnBlock(8), Halo, 96),
    (P.PerHead([P.Local(3), P.OwnBlock(8)]), Halo, 96),
    (P.Blocks(BANDED, 12), Halo, 96),
    (P.Strided(8), Remainders, 96),
    (P.PerHead([P.Strided(8), P.Strided(24)]), Remainders, 96),
    (P.Fixed(8, 4), Columns, 128),
    (P.Summary(8, 2, 1), Columns, 256),
    (P.Window(8) | P.Sink(4), Heads, 256),
    (P.Causal(), Heads, 50),
    (P.Blocks(BANDED | FIRST, 12), Heads, 96),
    (P.Local(8) | P.Strided(8), Heads, 96),
    (P.Local(60), Heads, 96),
    (P.Strided(7), Heads, 96),
]


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize(("pattern", "kind", "n"), CASES)
def test_each_device_reads_what_the_pattern_says(pattern, kind, n, devices):
    heads = 3
    m = positions_of_device([pattern], heads, n, devices)
    assert (devices - 1) * m < n <= devices * m
    found = partition(pattern, heads, n, m, devices)
    assert isinstance(found, kind)
    own_heads = 0
    for s in range(devices):
        of_device = list(range(heads))
        # Which position of the sequence each of the device's is, and which of them are its queries.
        if kind is Remainders:
            run = found.modulus // devices
            at = [row + s * run + t for row in range(0, devices * m, found.modulus) for t in range(run)]
            queries = range(m)
        elif kind is Halo:
            h = found.positions
            at = [*range(s * m - h, s * m + m)] if s else [*range(m + h)]
            queries = range(h, h + m) if s else range(m)
        elif kind is Columns:
            queries = range(s * m // found.stride * found.count, s * m // found.stride * found.count + m)
        else:
            at, queries = list(range(n)), range(n)
            of_device = list(range(own_heads, own_heads + found.heads[s]))
            own_heads += found.heads[s]
        for here, head in enumerate(of_device):
            if kind is Columns:
                taken = [b + c for b in range(0, s * m, found.stride) for r in found.columns[head] for c in range(*r)]
                at = [*taken, *range(s * m, s * m + m)]
            mask = found.patterns[s].mask(len(at), here)
            for query in queries:
                if at[query] < n:
                    keys = sorted(at[key] for key in np.flatnonzero(mask[query]))
                    assert keys == pattern.keys(at[query], head).tolist()
    assert kind is not Heads or own_heads == heads


def test_positions_are_a_multiple_only_where_no_device_would_be_left_without():
    patterns = [P.Local(8), P.Strided(8), P.Fixed(8, 4)]
    found = {n: positions_of_device(patterns, 2, n, 4) for n in (1, 4, 5, 31, 48, 49, 64)}
    assert found == {1: 1, 4: 1, 5: 2, 31: 8, 48: 12, 49: 16, 64: 16}


def test_what_is_sent_in_numbers():
    sizes = Sizes(chunk=64, devices=4, model_dim=24, num_heads=3, key_dim=8, value_dim=16)
    n = 256
    sent = {pattern: partition(pattern, 3, n, 64, 4).sent(sizes) for pattern in (P.Local(8), P.Strided(8), P.Causal())}
    assert sent[P.Local(8)] == 3 * 8 * 24
    assert sent[P.Strided(8)] == 2 * 3 * 64 * 24
    assert sent[P.Causal()] == 3 * 64 * 3 * 2 * (8 + 16)
    assert partition(P.Fixed(8, 4), 3, n, 64, 4).sent(sizes) == 6 * (64 // 8 * 4) * 3 * (8 + 16)
