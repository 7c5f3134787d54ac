"""Every stride-th position: the second head of strided attention."""

import numpy as np

from stf.patterns.component import Component, Kind
from stf.patterns.pattern import Pattern
from stf.patterns.validation import integer


class Strided(Pattern):
    """Every `stride`-th position back from the query: `{j <= i : (i - j) mod stride = 0}`.

    The second head of strided attention (Section 4.3 of Child et al. 2019). The merged head (Eq. 7)
    is `Local(stride) | Strided(stride)`.

    Examples:
        >>> stf.patterns.Strided(stride=3).keys(7)
        array([1, 4, 7])

    Args:
        stride: distance of neighbouring keys, 1 or more; the paper's l, close to the square root of
            the length.

    Raises:
        ValueError: if `stride` is not an integer, or less than 1.
    """

    _arguments = ("stride",)

    def __init__(self, stride: int) -> None:
        self.stride = integer("stride", stride, 1)

    def _keys(self, i):
        return np.arange(i % self.stride, i + 1, self.stride)

    def _mask(self, i, j):
        return (i - j) % self.stride == 0

    def _component(self):
        return Component(Kind.STRIDED, self.stride)
