"""The first positions, which every query sees."""

import numpy as np

from stf.patterns.component import Component, Kind
from stf.patterns.pattern import Pattern
from stf.patterns.validation import LARGEST, integer


class Sink(Pattern):
    """The first `size` positions: `{j <= i : j < size}`.

    Queries whose window has left the first positions behind lose what they had learned to rest on; with them in sight
    a window goes on as before (Xiao et al. 2023, "Efficient streaming language models with attention sinks").
    `Window(w) | Sink(4)` is that paper's. Of packed documents each has its own first positions where an attention's
    `restart` is set; without it they are the sequence's, which the first document alone sees.

    Examples:
        >>> (stf.patterns.Window(3) | stf.patterns.Sink(2)).keys(7)
        array([0, 1, 5, 6, 7])

    Args:
        size: number of positions, 1 or more.

    Raises:
        ValueError: if `size` is not an integer, or less than 1.
    """

    _arguments = ("size",)

    def __init__(self, size: int) -> None:
        self.size = integer("size", size, 1)

    def _keys(self, i):
        return np.arange(min(self.size, i + 1))

    def _mask(self, i, j):
        return j < self.size

    def _component(self):
        # The first columns of a block that no sequence is longer than.
        return Component(Kind.SUMMARY, LARGEST, 0, self.size, 1)
