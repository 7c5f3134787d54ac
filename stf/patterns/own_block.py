"""The query's own block: the first head of fixed attention."""

import numpy as np

from stf.patterns.component import Component, Kind
from stf.patterns.pattern import Pattern
from stf.patterns.validation import integer


class OwnBlock(Pattern):
    """The query's own block so far: `{j <= i : floor(j / stride) = floor(i / stride)}`.

    The first head of fixed attention (Section 4.3 of Child et al. 2019).

    Examples:
        >>> stf.patterns.OwnBlock(stride=4).keys(6)
        array([4, 5, 6])

    Args:
        stride: length of a block, 1 or more; the paper's l.

    Raises:
        ValueError: if `stride` is not an integer, or less than 1.
    """

    _arguments = ("stride",)

    def __init__(self, stride: int) -> None:
        self.stride = integer("stride", stride, 1)

    def _keys(self, i):
        return np.arange(i - i % self.stride, i + 1)

    def _mask(self, i, j):
        return i // self.stride == j // self.stride

    def _component(self):
        return Component(Kind.OWN_BLOCK, self.stride)
