"""How many hops a stack of layers needs until every position is reached."""

import math
from collections.abc import Iterable

import numpy as np

from stf.patterns.pattern import Pattern
from stf.patterns.union import check_patterns
from stf.patterns.validation import integer


def hops(patterns: Pattern | Iterable[Pattern], n: int, num_heads: int = 1) -> float:
    """The most hops from a position to one before it, through layers that use `patterns` in turn.

    Layer k attends by `patterns[k mod p]`; a hop goes down one layer, to a key of any head or, by
    the residual connection, to the position itself. The answer holds for whatever layer one begins
    at: it is the smallest number such that that many consecutive layers, the cycle beginning
    anywhere, connect every pair `j <= i`. Patterns that factorise dense attention need at most
    p + 1 (Section 4.2 of Child et al. 2019).

    Takes O(n**3) time and O(n**2) memory: meant for n of some hundreds.

    Examples:
        >>> p = stf.patterns
        >>> p.hops([p.Local(8), p.Strided(8)], 64), p.hops([p.OwnBlock(8), p.Summary(8, 2)], 64)
        (2, 3)

    Args:
        patterns: a list of patterns used in turn, or one pattern.
        n: number of positions.
        num_heads: heads of each layer.

    Returns:
        int, or `math.inf` where some pair is never connected.
    """
    turns = check_patterns("patterns", [patterns] if isinstance(patterns, Pattern) else patterns)
    n = integer("n", n, 0)
    heads = range(integer("num_heads", num_heads, 1))
    wanted = int(n * (n + 1) // 2)
    steps = []  # float32, so that the products below are fast; 1 where one hop leads
    for pattern in turns:
        step = np.eye(n, dtype=bool)
        for of_head in dict.fromkeys(pattern.for_head(head) for head in heads):
            step |= of_head.mask(n)
        steps.append(step.astype(np.float32))
    most = 0
    for top in range(len(steps)):
        reached = np.eye(n, dtype=np.float32)
        count, used, idle = int(reached.sum()), 0, 0
        while count < wanted:
            if idle == len(steps):  # a whole cycle brought nothing new
                return math.inf
            reached = (reached @ steps[(top - used) % len(steps)] > 0).astype(np.float32)
            now = int(np.count_nonzero(reached))
            idle = idle + 1 if now == count else 0
            count, used = now, used + 1
        most = max(most, used)
    return most
