"""What the kernels know: components. Their kinds and numbers are those of custom_ops/attention/problem.h."""

import dataclasses
import enum

import numpy as np


class Kind(enum.IntEnum):
    """Kinds of component: `stf_kind` of problem.h."""

    CAUSAL = 0
    LOCAL = 1
    STRIDED = 2
    OWN_BLOCK = 3
    SUMMARY = 4
    BLOCKS = 5
    COLUMNS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """A set of keys that the kernels know: a leaf's own, or one of the disjoint sets that a head runs.

    The kernels run a head's components one after the other and merge the outputs by log-sum-exp.

    Attributes:
        kind: `Kind`.
        a, b, c, d: what problem.h says for the kind, except that b of a block layout, its place
            among the layouts of a program, is 0 until `lower` packs it.
        exclude: bit t is set where the keys of the head's t-th component are left out of this one.
        layout: bool `[c, c]` for a block layout, None for all else.
    """

    kind: int
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    exclude: int = 0
    layout: np.ndarray | None = None

    def _identity(self):
        layout = None if self.layout is None else self.layout.tobytes()
        return self.kind, self.a, self.b, self.c, self.d, self.exclude, layout

    def __eq__(self, other):
        """Whether all attributes are equal, the layout bit by bit."""
        return isinstance(other, Component) and self._identity() == other._identity()

    def __hash__(self):
        """Equal for equal components."""
        return hash(self._identity())


def covers(component, i, j):
    """Whether a component holds the pairs of queries i and keys j, where j <= i; what is left out is not looked at.

    Args:
        component: a `Component`.
        i, j: integers that broadcast: NumPy's arrays or, but for block layouts, TensorFlow's tensors.

    Returns:
        The same of bools.
    """
    c = component
    if c.kind == Kind.CAUSAL:
        return j <= i
    if c.kind == Kind.LOCAL:
        return i - j <= c.a
    if c.kind == Kind.STRIDED:  # numbers are below 2**31, and so are positions; a product may be more
        return ((i - j) % c.a == 0) & (i - j >= min(c.b * c.a, 2**31 - 1))
    if c.kind == Kind.OWN_BLOCK:
        return j // c.a == i // c.a
    if c.kind in (Kind.SUMMARY, Kind.COLUMNS):
        column = j % c.a
        return (column >= c.b) & (column < c.c) & ((j // c.a < i // c.a) | (bool(c.d) & (i - j >= c.d - 1)))
    if c.kind == Kind.BLOCKS:
        return c.layout[i // c.a, j // c.a]
    raise ValueError(f"A component must be of a known kind. Received: kind={c.kind}")


def check_whole(component):
    """Returns a leaf's component, or raises ValueError where it is none that lowering may begin with.

    It must be of a known kind and leave nothing to other components: no keys excluded, a strided one from the query on
    (b is 0), a summary with its own block's columns (d is 1).
    """
    begins = {Kind.STRIDED: component.b == 0, Kind.SUMMARY: component.d == 1, Kind.COLUMNS: False}
    if component.kind not in list(Kind) or component.exclude or not begins.get(component.kind, True):
        raise ValueError(
            "A leaf's component must be of a known kind, with exclude=0, b=0 if strided, d=1 if a summary. "
            f"Received: component={component}"
        )
    return component
