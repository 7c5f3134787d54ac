"""The paper's attention sets, element by element: what the tests hold against stf.

Written from the formulas of Child et al. 2019 (arXiv 1904.10509), Sections 4.2 and 4.3, and from
nothing else: no module of stf is imported, and no arithmetic is shared with it. Positions are 0 to
n-1, the stride is l, the summary length is c, and every set is causal, `j <= i`. Each function
gives a bool array `[n, n]` whose row i is true at the keys of query i.
"""

import numpy as np


def from_rule(n, rule):
    """The mask of all `j <= i` for which `rule(i, j)` holds."""
    mask = np.zeros((n, n), bool)
    for i in range(n):
        for j in range(i + 1):
            if rule(i, j):
                mask[i, j] = True
    return mask


def causal(n):
    """{j : j <= i}"""
    return from_rule(n, lambda i, j: True)


def local(n, window):
    """{max(0, i - l), ..., i} with l = window: strided attention, first head."""
    return from_rule(n, lambda i, j: max(0, i - window) <= j)


def strided(n, stride):
    """{j : (i - j) mod l = 0}: strided attention, second head."""
    return from_rule(n, lambda i, j: (i - j) % stride == 0)


def own_block(n, stride):
    """{j : floor(j / l) = floor(i / l)}: fixed attention, first head."""
    return from_rule(n, lambda i, j: j // stride == i // stride)


def summary(n, stride, c, sub_block=0):
    """{j : l - c (s + 1) <= j mod l < l - c s} with s = sub_block: fixed attention, second head."""
    return from_rule(n, lambda i, j: stride - c * (sub_block + 1) <= j % stride < stride - c * sub_block)


def summary_of_head(n, stride, c, head):
    """The same where every head takes its own sub-block, s = head mod floor(l / c)."""
    return summary(n, stride, c, head % (stride // c))


def blocks(n, layout, block_size):
    """{j : layout[floor(i / block_size)][floor(j / block_size)]}: any layout, of one head."""
    return from_rule(n, lambda i, j: bool(layout[i // block_size][j // block_size]))


def union(*masks):
    """A head over the union of several sets (Eq. 7)."""
    result = masks[0].copy()
    for mask in masks[1:]:
        result |= mask
    return result


def merged_strided(n, stride):
    """Both heads of strided attention as one."""
    return union(local(n, stride), strided(n, stride))


def merged_fixed(n, stride, c, head=0):
    """Both heads of fixed attention as one."""
    return union(own_block(n, stride), summary_of_head(n, stride, c, head))
