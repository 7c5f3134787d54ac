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


def first(n, size):
    """{j <= i : j < size}: what sinks are, beside the paper."""
    return causal(n) & (np.arange(n)[None, :] < size)


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


def segment_ids(n, batch, seed=0):
    """Segment ids `[batch, n]`: one document, ever more with positions of none (-1) between them, and none at all."""
    random = np.random.default_rng([n, seed])
    rows = []
    for row in range(batch):
        starts = np.sort(random.integers(0, n + 1, [2, n // 7 + 1, 0, n // 70 + 1][(row + seed) % 4]))
        numbers = np.searchsorted(starts, np.arange(n), side="right")
        rows.append(np.where(numbers % 4 == 3, -1, numbers) if row != 3 else np.full(n, -1))
    return np.stack(rows).astype(np.int32)


def within_documents(mask, ids, restart):
    """A pattern's mask `[head, n, n]` within documents, `[batch, head, n, n]`.

    Args:
        mask: bool `[head, n, n]`.
        ids: `[batch, n]`, neighbours of one number are a document, negative ones of none.
        restart: whether the mask is counted from each document's first position on.
    """
    masks = np.zeros((len(ids), *mask.shape), bool)
    for row, of_batch in zip(ids, masks, strict=True):
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
        for begin, end in zip(edges, edges[1:], strict=False):
            if row[begin] >= 0:
                size = end - begin
                of_batch[:, begin:end, begin:end] = mask[:, :size, :size] if restart else mask[:, begin:end, begin:end]
    return masks
