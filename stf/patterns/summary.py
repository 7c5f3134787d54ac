"""The summary columns of every block: the second head of fixed attention."""

import numpy as np

from stf.patterns.component import Component, Kind
from stf.patterns.pattern import Pattern
from stf.patterns.validation import integer


class Summary(Pattern):
    """`summary` columns of every block so far: `{j <= i : l - c (s + 1) <= j mod l < l - c s}`.

    Here l is `stride`, c is `summary` and s the sub-block. The second head of fixed attention
    (Section 4.3 of Child et al. 2019): with several heads, each takes its own sub-block, counted
    from the block's end, `s = head mod floor(l / c)`. The own block's columns are in the set as far
    as the query; a query before the first such column attends to nothing.

    Examples:
        >>> stf.patterns.Summary(stride=4, summary=1).keys(9)
        array([3, 7])
        >>> stf.patterns.Summary(stride=4, summary=1).keys(9, head=1)
        array([2, 6])
        >>> stf.patterns.Summary(stride=4, summary=1, sub_block=1).keys(9)
        array([2, 6])

    Args:
        stride: length of a block, 1 or more; the paper's l.
        summary: number of columns of a block, from 1 to `stride`; the paper's c.
        sub_block: the sub-block of every head, from 0 to `floor(stride / summary) - 1`; None: each
            head its own.

    Raises:
        ValueError: if an argument is not an integer or out of the range above.
    """

    _arguments = ("stride", "summary", "sub_block")

    def __init__(self, stride: int, summary: int, sub_block: int | None = None) -> None:
        self.stride, self.summary, self.sub_block = check_summary(stride, summary, sub_block)

    def _for_head(self, head):
        if self.sub_block is not None:
            return self
        return self._with(sub_block=head % (self.stride // self.summary))

    @property
    def columns(self) -> tuple[int, int]:
        """(first, last + 1) of the columns within a block; of head 0 where heads differ."""
        end = self.stride - self.summary * (self.sub_block or 0)
        return end - self.summary, end

    def _keys(self, i):
        blocks = np.arange(0, i + 1, self.stride)  # [blocks], the position that each begins at
        keys = (blocks[:, None] + np.arange(*self.columns)).reshape(-1)
        return keys[keys <= i]

    def _mask(self, i, j):
        first, end = self.columns
        return (first <= j % self.stride) & (j % self.stride < end)

    def _component(self):
        return Component(Kind.SUMMARY, self.stride, *self.columns, 1)


def check_summary(stride, summary, sub_block):
    """Returns the three arguments as ints (`sub_block` may be None) or raises ValueError."""
    stride = integer("stride", stride, 1)
    summary = integer("summary", summary, 1)
    if summary > stride:
        raise ValueError(f"`summary` must not be larger than `stride`. Received: summary={summary}, stride={stride}")
    if sub_block is not None:
        sub_block = integer("sub_block", sub_block, 0)
        if sub_block >= stride // summary:
            raise ValueError(
                "`sub_block` must be less than floor(stride / summary) = "
                f"{stride // summary}. Received: sub_block={sub_block}, "
                f"stride={stride}, summary={summary}"
            )
    return stride, summary, sub_block
