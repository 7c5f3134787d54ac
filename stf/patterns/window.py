"""The latest positions, counted as sliding windows are elsewhere."""

import numpy as np

from stf.patterns.component import Component, Kind
from stf.patterns.pattern import Pattern
from stf.patterns.validation import integer


class Window(Pattern):
    """A sliding window: the `size` latest positions, the query itself among them, `{j <= i : i - j < size}`.

    As other libraries count: `Window(w)` sees what `Local(w - 1)` sees, w keys.

    Examples:
        >>> stf.patterns.Window(3).keys(7)
        array([5, 6, 7])

    Args:
        size: keys of a query, 1 or more.

    Raises:
        ValueError: if `size` is not an integer, or less than 1.
    """

    _arguments = ("size",)

    def __init__(self, size: int) -> None:
        self.size = integer("size", size, 1)

    def _keys(self, i):
        return np.arange(max(0, i - self.size + 1), i + 1)

    def _mask(self, i, j):
        return i - j < self.size

    def _component(self):
        return Component(Kind.LOCAL, self.size - 1)
