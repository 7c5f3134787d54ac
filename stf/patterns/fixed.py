"""Merged fixed attention."""

from stf.patterns.own_block import OwnBlock
from stf.patterns.pattern import Pattern
from stf.patterns.summary import Summary, check_summary


class Fixed(Pattern):
    """Both heads of fixed attention merged into one (Section 4.3 and Eq. 7 of Child et al. 2019).

    The same set as `OwnBlock(stride) | Summary(stride, summary, sub_block)`.

    Examples:
        >>> stf.patterns.Fixed(stride=4, summary=1).keys(9)
        array([3, 7, 8, 9])

    Args:
        stride: length of a block, 1 or more; the paper's l.
        summary: number of summary columns of a block, from 1 to `stride`; the paper's c, in {8, 16,
            32}.
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

    def _leaves(self):
        return OwnBlock(self.stride), Summary(self.stride, self.summary, self.sub_block)
