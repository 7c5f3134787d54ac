"""Lowering: the packed components are disjoint, and together they are the pattern."""

import numpy as np
import paper_sets
import pytest
from hypothesis import given, settings
from test_patterns import stacks

from stf.patterns import (
    Blocks,
    Causal,
    Component,
    Fixed,
    Kind,
    Local,
    OwnBlock,
    PerHead,
    Strided,
    Summary,
    Union,
    components_mask,
    lower,
)


def check_program(pattern, num_heads, expected):
    """Each head's components are disjoint and cover `expected[head]` exactly."""
    program = lower(pattern, num_heads)
    assert all(type(number) is int for number in program.components + program.program_begin)
    assert len(program.components) == 6 * program.program_begin[-1]
    for head in range(num_heads):
        sets = components_mask(program, len(expected[head]), head)
        assert len(sets) >= 1
        assert sets.sum(axis=0).max(initial=0) <= 1, "components overlap"
        np.testing.assert_array_equal(sets.any(axis=0), expected[head])
    return program


@given(stacks())
@settings(max_examples=400)
def test_components_are_disjoint_and_exact(stack):
    parts, masks, _ = stack
    check_program(Union(parts), 1, [paper_sets.union(*masks)])


@given(stacks(n=19), stacks(n=19))
@settings(max_examples=50)
def test_programs_of_heads(one, other):
    expected = [paper_sets.union(*masks) for masks in (one[1], other[1])]
    check_program(PerHead([Union(one[0]), Union(other[0])]), 5, [expected[h % 2] for h in range(5)])


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (Causal(), [(Kind.CAUSAL, 0, 0, 0, 0)]),
        (Local(7), [(Kind.LOCAL, 7, 0, 0, 0)]),
        (Strided(8), [(Kind.STRIDED, 8, 0, 0, 0)]),
        (OwnBlock(8), [(Kind.OWN_BLOCK, 8, 0, 0, 0)]),
        (Summary(8, 2, 1), [(Kind.SUMMARY, 8, 4, 6, 1)]),
        (Fixed(8, 3, 0), [(Kind.OWN_BLOCK, 8, 0, 0, 0), (Kind.SUMMARY, 8, 5, 8, 0)]),
        (
            Summary(8, 2, 0) | OwnBlock(8),
            [(Kind.OWN_BLOCK, 8, 0, 0, 0), (Kind.SUMMARY, 8, 6, 8, 0)],
        ),
        (Local(8) | Strided(8), [(Kind.LOCAL, 8, 0, 0, 0), (Kind.STRIDED, 8, 2, 0, 0)]),
        (Strided(8) | Local(7), [(Kind.LOCAL, 7, 0, 0, 0), (Kind.STRIDED, 8, 1, 0, 0)]),
        (Strided(8) | OwnBlock(8), [(Kind.OWN_BLOCK, 8, 0, 0, 0), (Kind.STRIDED, 8, 1, 0, 0)]),
        (Local(3) | Causal() | Strided(2), [(Kind.CAUSAL, 0, 0, 0, 0)]),
        (Local(3) | Local(9) | Local(3), [(Kind.LOCAL, 9, 0, 0, 0)]),
        (Local(7) | OwnBlock(8), [(Kind.LOCAL, 7, 0, 0, 0)]),
        (OwnBlock(4) | OwnBlock(12), [(Kind.OWN_BLOCK, 12, 0, 0, 0)]),
        (Strided(4) | Strided(12), [(Kind.STRIDED, 4, 0, 0, 0)]),
        (Strided(4) | Local(0), [(Kind.STRIDED, 4, 0, 0, 0)]),
        (Strided(1) | Local(5), [(Kind.CAUSAL, 0, 0, 0, 0)]),
        (Summary(6, 6) | Local(5), [(Kind.CAUSAL, 0, 0, 0, 0)]),
        (Summary(6, 3, 0) | Summary(6, 3, 1), [(Kind.CAUSAL, 0, 0, 0, 0)]),
        (Summary(6, 2, 0) | Summary(6, 2, 1), [(Kind.SUMMARY, 6, 2, 6, 1)]),
    ],
)
def test_simplification(pattern, expected):
    """What needs no mask gets none: these forms are what the kernels are fast at."""
    assert [(p.kind, p.a, p.b, p.c, p.d) for p in pattern.components()] == expected
    assert not any(part.exclude for part in pattern.components())


def test_columns_of_one_stride_exclude_nothing():
    one, other = (Summary(9, 2, 0) | Summary(9, 2, 3)).components()
    assert (one.b, one.c, other.b, other.c) == (1, 3, 7, 9)
    assert one.exclude == other.exclude == 0


def test_block_layouts_lose_what_others_cover():
    layout = np.tril(np.ones((4, 4), bool))
    layout[3, 1] = False
    own, blocks = (OwnBlock(8) | Blocks(layout, 4)).components()
    assert own == Component(Kind.OWN_BLOCK, 8)
    assert blocks.exclude == 0
    assert blocks.layout.astype(int).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
    ]
    assert (Local(7) | Blocks(np.eye(4, dtype=bool), 4)).components() == (Component(Kind.LOCAL, 7),)


@pytest.mark.parametrize(
    "pattern, expected",
    [
        # A window one short of the own block's first column leaves that to the summary.
        (Local(6) | Summary(8, 2, 3), paper_sets.local(40, 6) | paper_sets.summary(40, 8, 2, 3)),
        (Local(7) | Summary(8, 2, 3), paper_sets.local(40, 7) | paper_sets.summary(40, 8, 2, 3)),
        (Local(2) | Summary(8, 4, 0), paper_sets.local(40, 2) | paper_sets.summary(40, 8, 4, 0)),
        # Columns 5 and 7: a gap of one.
        (
            Summary(8, 1, 0) | Summary(8, 1, 2),
            paper_sets.summary(40, 8, 1, 0) | paper_sets.summary(40, 8, 1, 2),
        ),
        # The last query of an own block, and a key as far back as its first.
        (OwnBlock(9) | Strided(8), paper_sets.own_block(40, 9) | paper_sets.strided(40, 8)),
        (
            OwnBlock(5) | Blocks(np.eye(10, k=-2, dtype=bool), 3),
            paper_sets.own_block(30, 5) | paper_sets.blocks(30, np.eye(10, k=-2), 3),
        ),
        # A layout whose nearest key is 5 positions back, beside windows around that.
        *(
            (
                Local(window) | Blocks(np.eye(10, k=-2, dtype=bool), 4),
                paper_sets.local(40, window) | paper_sets.blocks(40, np.eye(10, k=-2), 4),
            )
            for window in (4, 5, 10, 11)
        ),
    ],
)
def test_edges_of_the_closed_forms(pattern, expected):
    check_program(pattern, 1, [expected])


def test_summary_leaves_its_own_block_to_a_window():
    assert (Local(3) | Summary(8, 4, 0)).components()[1] == Component(Kind.SUMMARY, 8, 4, 8, 0, 1)
    assert (Local(2) | Summary(8, 4, 0)).components()[1] == Component(Kind.SUMMARY, 8, 4, 8, 1, 1)


def test_excludes_only_what_may_overlap():
    local, strided, summary = (Local(3) | Summary(6, 2, 0) | Strided(8)).components()
    assert (local.kind, strided.kind, summary.kind) == (Kind.LOCAL, Kind.STRIDED, Kind.SUMMARY)
    assert (local.exclude, strided.exclude, summary.exclude) == (0, 0, 0b11)


def test_programs_repeat_as_heads_do():
    assert lower(Local(3), 8).program_begin == [0, 1]
    assert lower(Fixed(8, 2), 8).program_begin == [0, 2, 4, 6, 8]  # four sub-blocks
    assert lower(Fixed(8, 2), 3).program_begin == [0, 2, 4, 6]
    assert lower(PerHead([Local(3), Fixed(8, 2)]), 8).program_begin == [0, 1, 3, 4, 6]
    same = PerHead([Local(3), Local(3) | Local(2)])
    assert lower(same, 6) == lower(Local(3), 6)


def test_layouts_are_packed():
    one, other = np.zeros((2, 3, 3), bool)
    one[0, 0] = one[2, 1] = other[2, 2] = True
    layouts = np.stack([one, other, one, one])  # stored once each
    expected = [paper_sets.blocks(11, layout, 4) for layout in layouts]
    program = check_program(Blocks(layouts, 4), 4, expected)
    # Bits 0 and 7 of the one; bit 8, in its second byte, of the other.
    assert program.layouts == bytes([0b10000001, 0, 0, 1])
    first, second = [5, 4, 0, 3, 0, 0], [5, 4, 16, 3, 0, 0]
    assert program.components == first + second + first  # the fourth head is the first again


def test_empty_layouts_keep_a_component():
    empty = Blocks(np.zeros((2, 2), bool), 4) | Blocks(np.zeros((8, 8), bool), 1)
    check_program(empty, 2, [np.zeros((8, 8), bool)] * 2)
    assert len(empty.components()) == 1


@pytest.mark.parametrize("num_heads", [1, 3, 4])
def test_layouts_must_match_the_heads(num_heads):
    pattern = Blocks(np.ones((2, 2, 2), bool), 4)
    for outer in (pattern, pattern | Local(1), PerHead([pattern, Local(1)])):
        with pytest.raises(ValueError, match=rf"num_heads={num_heads} .*shape \(2, 2, 2\)"):
            lower(outer, num_heads)
    assert len(lower(pattern, 2).program_begin) == 2  # both heads alike


def test_too_many_components_are_refused():
    primes = [p for p in range(2, 400) if all(p % q for q in range(2, p))]
    with pytest.raises(ValueError, match="Received: 78 components"):
        Union([Strided(p) for p in primes]).components()
    n = 60
    pattern = Union([Strided(p) for p in primes[:63]])
    expected = paper_sets.union(*(paper_sets.strided(n, p) for p in primes[:63]))
    check_program(pattern, 1, [expected])
    assert pattern.pairs(n) == expected.sum()


def test_components_compare_by_value():
    one = Blocks([[True, False], [True, True]], 4).components()
    assert one == Blocks([[True, True], [True, True]], 4).components()  # the upper triangle is void
    assert hash(one) == hash(Blocks([[True, True], [True, True]], 4).components())
    assert one != Blocks([[True, False], [False, True]], 4).components()
    assert Local(3).components() != Local(4).components()
