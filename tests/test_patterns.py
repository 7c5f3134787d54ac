"""Patterns: their sets against the paper's, counts, costs, reach and refusals."""

import math

import numpy as np
import paper_sets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stf import patterns
from stf.patterns import Blocks, Causal, Fixed, Local, OwnBlock, PerHead, Sink, Strided, Summary, Union, Window

# (length, stride, summary): around the stride, primes, a cut block, summary not a divisor.
SIZES = [
    (0, 3, 1),
    (1, 1, 1),
    (1, 4, 2),
    (7, 8, 3),
    (8, 8, 8),
    (9, 8, 2),
    (31, 5, 2),
    (37, 12, 5),
    (48, 6, 2),
    (61, 7, 1),
]


@st.composite
def stacks(draw, n=None):
    """(leaf patterns of one head, their masks by paper_sets, n)."""
    n = draw(st.integers(0, 40)) if n is None else n
    # Sizes of one stack are mostly kin, so that one part's closed forms meet another's.
    kin = draw(st.integers(1, 8))
    size = st.sampled_from([kin, kin, 2 * kin, 3 * kin]) | st.integers(1, 14)
    parts, masks = [], []
    for kind in draw(st.lists(st.sampled_from("clsobfmnw"), min_size=1, max_size=5)):
        stride = draw(size)
        c = draw(st.integers(1, stride))
        s = draw(st.integers(0, stride // c - 1))
        if kind == "c" and len(parts) < 3:  # seldom: it hides all else
            parts.append(Causal())
            masks.append(paper_sets.causal(n))
        elif kind == "l":
            window = max(0, stride + draw(st.integers(-3, 1)))
            parts.append(Local(window))
            masks.append(paper_sets.local(n, window))
        elif kind == "o":
            parts.append(OwnBlock(stride))
            masks.append(paper_sets.own_block(n, stride))
        elif kind == "f":
            parts.append(Fixed(stride, c, s))
            masks.append(paper_sets.union(paper_sets.own_block(n, stride), paper_sets.summary(n, stride, c, s)))
        elif kind == "n":
            parts.append(Sink(stride))
            masks.append(paper_sets.first(n, stride))
        elif kind == "w":
            parts.append(Window(stride))
            masks.append(paper_sets.local(n, stride - 1))
        elif kind == "m":
            parts.append(Summary(stride, c, s))
            masks.append(paper_sets.summary(n, stride, c, s))
        elif kind == "b":
            blocks = max(1, math.ceil(n / stride))
            bits = draw(st.integers(0, 2 ** (blocks * blocks) - 1))
            layout = [[bits >> (r * blocks + k) & 1 == 1 for k in range(blocks)] for r in range(blocks)]
            parts.append(Blocks(layout, stride))
            masks.append(paper_sets.blocks(n, layout, stride))
        else:
            parts.append(Strided(stride))
            masks.append(paper_sets.strided(n, stride))
    return parts, masks, n


def check_set(pattern, expected, head=0):
    """Everything that a pattern says of its set agrees with a mask."""
    n = len(expected)
    np.testing.assert_array_equal(pattern.mask(n, head), expected)
    np.testing.assert_array_equal(pattern.counts(n, head), expected.sum(axis=1))
    pairs = pattern.pairs(n, head)
    assert type(pairs) is int and pairs == expected.sum()
    for i in range(n):
        keys = pattern.keys(i, head)
        assert keys.dtype == np.int64
        np.testing.assert_array_equal(keys, np.flatnonzero(expected[i]))


@pytest.mark.parametrize("n, stride, c", SIZES)
def test_sets_are_the_papers(n, stride, c):
    check_set(Causal(), paper_sets.causal(n))
    check_set(Local(stride), paper_sets.local(n, stride))
    check_set(Strided(stride), paper_sets.strided(n, stride))
    check_set(OwnBlock(stride), paper_sets.own_block(n, stride))
    check_set(Local(stride) | Strided(stride), paper_sets.merged_strided(n, stride))
    for head in range(stride // c + 2):
        check_set(Summary(stride, c), paper_sets.summary_of_head(n, stride, c, head), head)
        check_set(Fixed(stride, c), paper_sets.merged_fixed(n, stride, c, head), head)
    for s in range(stride // c):
        check_set(Summary(stride, c, s), paper_sets.summary(n, stride, c, s), head=5)


def test_known_keys():
    """Numbers worked out by hand, so that a mistake shared with paper_sets would show."""
    assert Local(2).keys(6).tolist() == [4, 5, 6]
    assert Local(0).keys(6).tolist() == [6]
    assert Strided(4).keys(9).tolist() == [1, 5, 9]
    assert OwnBlock(4).keys(9).tolist() == [8, 9]
    assert Summary(8, 2).keys(17).tolist() == [6, 7, 14, 15]
    assert Summary(8, 2).keys(22).tolist() == [6, 7, 14, 15, 22]
    assert Summary(8, 3).keys(15, head=1).tolist() == [2, 3, 4, 10, 11, 12]
    assert Summary(8, 3).keys(15, head=2).tolist() == Summary(8, 3).keys(15, head=0).tolist()
    assert Summary(8, 2).keys(5).tolist() == []


@given(stacks())
@settings(max_examples=150)
def test_unions_are_exact(stack):
    parts, masks, _ = stack
    check_set(Union(parts), paper_sets.union(*masks))


@given(stacks(n=23), stacks(n=23), st.integers(0, 5))
@settings(max_examples=30)
def test_per_head_cycles(one, other, head):
    pattern = PerHead([Union(one[0]), Union(other[0])])
    check_set(pattern, paper_sets.union(*(one, other)[head % 2][1]), head)


def test_heads_pass_through_unions_and_per_head():
    pattern = PerHead([Local(1) | Summary(6, 2), Fixed(6, 2)])
    n = 20
    for head in range(7):
        first = paper_sets.local(n, 1) if head % 2 == 0 else paper_sets.own_block(n, 6)
        check_set(pattern, first | paper_sets.summary_of_head(n, 6, 2, head), head)


def test_blocks_with_one_layout_a_head():
    layouts = np.random.default_rng(0).random((3, 4, 4)) < 0.5
    pattern = Blocks(layouts, 5)
    for head in range(3):
        check_set(pattern, paper_sets.blocks(17, layouts[head], 5), head)
    with pytest.raises(ValueError, match="head=3"):
        pattern.mask(17, 3)


def test_counts_at_full_size():
    """Closed forms at a length where a matrix would take a terabyte."""
    n, stride = 1 << 20, 1024
    assert Causal().pairs(n) == n * (n + 1) // 2
    assert Strided(stride).pairs(n) == stride * (n // stride) * (n // stride + 1) // 2
    assert OwnBlock(stride).pairs(n) == n * (stride + 1) // 2
    assert (Local(stride) | Strided(stride)).pairs(n) == (
        sum(min(i, stride) + 1 for i in range(n)) + stride * sum(max(0, k - 1) for k in range(n // stride))
    )


def test_flops_and_bytes():
    n, pattern = 30, PerHead([Fixed(6, 2), Strided(4)])
    pairs = sum(pattern.pairs(n, head) for head in range(5))
    # 2 operations a pair and depth: scores and output; backward scores again, dP, dV, dQ, dK.
    assert pattern.flops(n, 8, 3, num_heads=5, batch=7) == 7 * pairs * (2 * 8 + 2 * 3)
    both = pattern.flops(n, 8, 3, num_heads=5, batch=7, backward=True)
    assert both == 7 * pairs * (2 * 8 + 2 * 3 + 6 * 8 + 4 * 3)
    rows = 7 * 5 * n
    q_k, v_out = 2 * rows * 8 * 2, 2 * rows * 3 * 2
    forward = pattern.bytes(n, 8, 3, num_heads=5, batch=7, itemsize=2)
    assert forward == q_k + v_out + 4 * rows
    both = pattern.bytes(n, 8, 3, num_heads=5, batch=7, itemsize=2, backward=True)
    # reads q, k, v, out, dout and lse; writes dq, dk, dv
    assert both == forward + (q_k + v_out + v_out // 2 + 4 * rows) + (q_k + v_out // 2)


@pytest.mark.parametrize("stride, c", [(4, 1), (5, 2), (8, 3), (9, 9)])
@pytest.mark.parametrize("n", [1, 8, 17, 50])
def test_reach(n, stride, c):
    """The paper's factorised patterns connect all within p + 1 hops; merged, within two."""
    assert patterns.hops([Local(stride), Strided(stride)], n) <= 3
    assert patterns.hops([OwnBlock(stride), Summary(stride, c)], n) <= 3
    assert patterns.hops(Local(stride) | Strided(stride), n) <= 2
    assert patterns.hops(Fixed(stride, c), n) <= 2
    assert patterns.hops(PerHead([OwnBlock(stride), Summary(stride, c, 0)]), n, num_heads=2) <= 2
    assert patterns.hops([Causal()], n) == min(1, n - 1)


def test_reach_is_counted_by_walking():
    assert patterns.hops(Local(1), 10) == 9
    assert patterns.hops(Local(3), 10) == 3
    assert patterns.hops([Local(1), Causal()], 10) == 2  # beginning at the local layer
    assert patterns.hops([Local(8), Strided(8)], 64) == 2
    assert patterns.hops([OwnBlock(8), Summary(8, 2)], 64) == 3
    assert patterns.hops(OwnBlock(4), 8) == math.inf
    assert patterns.hops([OwnBlock(4), Strided(3)], 0) == 0


@pytest.mark.parametrize("number", [0, -3, 2.0, "8", True, np.True_, None, np.float32(2), 2**31])
def test_sizes_must_be_integers_of_one_or_more(number):
    for argument, make in [
        ("stride", lambda: Strided(number)),
        ("stride", lambda: OwnBlock(number)),
        ("stride", lambda: Summary(number, 1)),
        ("summary", lambda: Summary(4, number)),
        ("stride", lambda: Fixed(number, 1)),
        ("block_size", lambda: Blocks([[True]], number)),
        ("num_heads", lambda: patterns.lower(Causal(), number)),
        ("key_dim", lambda: Causal().flops(4, number, 4)),
    ]:
        with pytest.raises(ValueError, match=f"(?s)`{argument}` must.*Received: {argument}="):
            make()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Local(-1), "Received: window=-1"),
        (lambda: Local(1.5), "Received: window=1.5"),
        (lambda: Summary(4, 5), "Received: summary=5, stride=4"),
        (lambda: Summary(7, 3, 2), "Received: sub_block=2, stride=7, summary=3"),
        (lambda: Fixed(7, 3, -1), "Received: sub_block=-1"),
        (lambda: Fixed(7, 3, False), "Received: sub_block=False"),
        (lambda: Blocks([[1, 0], [1, 1]], 2), "Received: layout of dtype int"),
        (lambda: Blocks([[True], [True, True]], 2), "`layout` must be a bool array"),
        (lambda: Blocks(np.ones((2, 3), bool), 2), r"Received: layout of shape \(2, 3\)"),
        (lambda: Blocks(np.ones((0, 0), bool), 2), r"Received: layout of shape \(0, 0\)"),
        (lambda: Blocks(np.ones((0, 2, 2), bool), 2), r"Received: layout of shape \(0, 2, 2\)"),
        (lambda: Blocks(np.ones(4, bool), 2), r"Received: layout of shape \(4,\)"),
        (lambda: Blocks(np.ones((2, 2), bool), 4).mask(9), "Received: n=9"),
        (lambda: Blocks(np.ones((2, 2), bool), 4).pairs(4), "Received: n=4"),
        (lambda: Blocks(np.ones((2, 2), bool), 4).keys(8), "Received: i=8"),
        (lambda: (Causal() | Blocks([[True]], 4)).mask(5), "Received: n=5"),
        (lambda: PerHead([Causal(), Blocks([[True]], 4)]).mask(5), "Received: n=5"),
        (lambda: Union([]), r"Received: parts=\[\]"),
        (lambda: Union(Causal()), r"Received: parts=Causal\(\)"),
        (lambda: Union([Causal(), "local"]), "Received: parts="),
        (lambda: PerHead([]), r"Received: patterns=\[\]"),
        (lambda: PerHead(3), "Received: patterns=3"),
        (lambda: Causal().keys(-1), "Received: i=-1"),
        (lambda: Causal().keys(3, head=-1), "Received: head=-1"),
        (lambda: Summary(4, 1).keys(3, head=0.0), "Received: head=0.0"),
        (lambda: Causal().mask(-1), "Received: n=-1"),
        (lambda: Causal().pairs(2.0), "Received: n=2.0"),
        (lambda: patterns.hops([], 4), r"Received: patterns=\[\]"),
        (lambda: patterns.get("Causal"), "Received: pattern='Causal'"),
    ],
)
def test_refusals_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_or_refuses_what_is_not_a_pattern():
    with pytest.raises(TypeError):
        Causal() | 3
