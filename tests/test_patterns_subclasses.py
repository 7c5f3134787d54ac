"""Patterns of a user's own: what runs them says their set, or nothing runs them."""

import numpy as np
import paper_sets
import pytest
import tensorflow as tf

from stf import ops, patterns
from stf.patterns import (
    Blocks,
    Causal,
    Component,
    Fixed,
    Kind,
    Local,
    OwnBlock,
    Pattern,
    PerHead,
    Strided,
    Summary,
    Union,
    components_mask,
    lower,
)

N = 20


class Window(Pattern):
    """A leaf that the kernels are told nothing of."""

    _arguments = ("window",)

    def __init__(self, window):
        self.window = window

    def _keys(self, i):
        return np.arange(max(0, i - self.window), i + 1)

    def _mask(self, i, j):
        return i - j <= self.window


class KnownWindow(Window):
    """The same, of which they are told."""

    def _component(self):
        return Component(Kind.LOCAL, self.window)


def of_even_keys(base):
    """A subclass of `base` that leaves out the odd keys."""

    class Even(base):
        def _keys(self, i):
            keys = super()._keys(i)
            return keys[keys % 2 == 0]

        def _mask(self, i, j):
            return super()._mask(i, j) & (j % 2 == 0)

    return Even


class Mixin:
    def _mask(self, i, j):
        return i == j


class MixedIn(Mixin, Local):
    pass


class PublicMask(Local):
    def mask(self, n, head=0):
        return np.eye(n, dtype=bool)


class FixedMask(Fixed):
    def _mask(self, i, j):
        return i == j


class UnionMask(Union):
    def mask(self, n, head=0):
        return np.eye(n, dtype=bool)


UNKNOWN = [
    Window(2),
    of_even_keys(Local)(3),
    of_even_keys(Summary)(4, 1),
    of_even_keys(Summary)(4, 1, 0),
    of_even_keys(Blocks)(np.ones((1, 5, 5), bool), 4),
    MixedIn(3),
    PublicMask(3),
    FixedMask(4, 1),
    FixedMask(4, 1, 0),
    UnionMask([Local(2), Strided(4)]),
]


@pytest.mark.parametrize("pattern", UNKNOWN, ids=lambda pattern: type(pattern).__mro__[1].__name__)
def test_a_set_that_no_component_says_is_not_run(pattern):
    query = tf.ones([1, N, 1, 2])
    name = type(pattern).__name__
    for whole in (pattern, pattern | Strided(4), Causal() | pattern, PerHead([pattern, Causal()])):
        for run in (
            lambda: ops.attention(query, query, query, whole),
            lambda: tf.function(ops.attention)(query, query, query, whole),
            lambda: lower(whole, 1),
            lambda: whole.components(),
            lambda: whole.pairs(N),
        ):
            with pytest.raises(NotImplementedError, match=rf"{name} must define `_component`"):
                run()


def test_its_mask_is_its_own_and_the_reference_runs_it():
    query, key, value = (tf.random.stateless_normal([1, N, 2, 4], [0, k]) for k in range(3))
    same = ops.reference_attention(query, key, value, Local(2) | Strided(4))
    np.testing.assert_array_equal(ops.reference_attention(query, key, value, Window(2) | Strided(4)), same)
    even = np.arange(N) % 2 == 0
    for head in range(4):
        expected = paper_sets.summary_of_head(N, 4, 1, head) & even
        np.testing.assert_array_equal(of_even_keys(Summary)(4, 1).mask(N, head), expected)
    np.testing.assert_array_equal(FixedMask(4, 1).mask(N, 3), np.eye(N, dtype=bool))
    np.testing.assert_array_equal((UnionMask([Local(2)]) | Local(0)).for_head(1)._leaves()[0].mask(N), np.eye(N))


def test_a_component_of_ones_own_runs_alone_and_in_a_union():
    query, key, value = (tf.random.stateless_normal([1, N, 2, 4], [0, k]) for k in range(3))
    for ours, theirs in ((KnownWindow(2), Local(2)), (KnownWindow(2) | Strided(4), Local(2) | Strided(4))):
        assert lower(ours, 2) == lower(theirs, 2)
        assert ours.pairs(N) == theirs.pairs(N)
        output, want = (ops.attention(query, key, value, pattern) for pattern in (ours, theirs))
        np.testing.assert_array_equal(output, want)


@pytest.mark.parametrize(
    "kind, arguments",
    [
        (Causal, ()),
        (Local, (3,)),
        (Strided, (4,)),
        (OwnBlock, (4,)),
        (Summary, (4, 1)),
        (Fixed, (4, 1)),
        (Blocks, (np.ones((2, 5, 5), bool), 4)),
        (Union, ([Local(2), Fixed(4, 1)],)),
        (PerHead, ([Local(2), Fixed(4, 1)],)),
    ],
)
def test_a_subclass_that_changes_nothing_of_the_set_runs(kind, arguments):
    class Named(kind):
        def __init__(self, name, *arguments):
            super().__init__(*arguments)
            self.name = name

    pattern = Named("mine", *arguments)
    assert lower(pattern, 2) == lower(kind(*arguments), 2)
    if kind is not PerHead:
        assert type(pattern.for_head(1)) is Named and pattern.for_head(1).name == "mine"


def test_every_leaf_says_the_set_of_its_mask():
    for leaf in (Causal(), Local(3), Strided(4), OwnBlock(4), Summary(6, 2, 1), Blocks(np.eye(5, dtype=bool), 4)):
        np.testing.assert_array_equal(components_mask(lower(leaf, 1), N)[0], leaf.mask(N))


def test_equality_does_not_need_the_arguments_names():
    """Else one pattern would run the program that was lowered for another."""

    class Unnamed(KnownWindow):
        _arguments = ()

    assert Unnamed(2) != Unnamed(3)
    query = tf.random.stateless_normal([1, N, 1, 2], [1, 2])
    for window in (2, 3):
        same = ops.attention(query, query, query, Local(window))
        np.testing.assert_array_equal(ops.attention(query, query, query, Unnamed(window)), same)


@pytest.mark.parametrize(
    "component",
    [
        Component(9),
        Component(Kind.STRIDED, 4, 1),
        Component(Kind.SUMMARY, 4, 1, 2, 0),
        Component(Kind.LOCAL, 4, exclude=1),
    ],
)
def test_a_component_that_is_not_whole_is_refused(component):
    class Part(KnownWindow):
        def _component(self):
            return component

    for run in (lambda: lower(Part(2) | Strided(4), 1), lambda: Part(2).pairs(N)):
        with pytest.raises(ValueError, match=r"Received: component=Component\(kind="):
            run()


def test_a_class_of_ones_own_is_not_saved_under_the_name_of_another():
    class Local(patterns.Local):
        pass

    with pytest.raises(ValueError, match="Local"):
        patterns.serialize(Local(3))
    assert patterns.serialize(KnownWindow(3))["class_name"] == "KnownWindow"
