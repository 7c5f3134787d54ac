"""The latest positions: the first head of strided attention."""

import numpy as np

from stf.patterns.component import Component, Kind
from stf.patterns.pattern import Pattern
from stf.patterns.validation import integer


class Local(Pattern):
    """The query and the `window` positions before it: `{max(0, i - window), ..., i}`.

    That is `window + 1` keys at most. With `window = l` this is the first head of strided attention
    (Section 4.3 of Child et al. 2019). The code that its authors released attends to one key less:
    that is `Local(l - 1)`.

    Examples:
        >>> stf.patterns.Local(window=2).keys(5)
        array([3, 4, 5])

    Args:
        window: farthest distance of a key from its query, 0 or more.

    Raises:
        ValueError: if `window` is not an integer, or negative.
    """

    _arguments = ("window",)

    def __init__(self, window: int) -> None:
        self.window = integer("window", window, 0)

    def _keys(self, i):
        return np.arange(max(0, i - self.window), i + 1)

    def _mask(self, i, j):
        return i - j <= self.window

    def _component(self):
        return Component(Kind.LOCAL, self.window)
