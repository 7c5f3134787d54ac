"""Exact numbers of keys of a union of leaves' components, in O(n) memory and without an n x n array.

Every kind has one of three shapes, and each shape is closed under union:

- an interval that ends at the query (causal, local, own block): the longest one wins;
- a set of columns that does not depend on the query beyond its row of blocks (summary, block
  layouts): one bit a position;
- distances that are multiples of a stride (strided): two strides share the multiples of their least
  common multiple.

So a query's count is its interval, plus the columns before the interval, plus, for each stride and
by inclusion and exclusion over the strides, the positions before the interval that are not such
columns.
"""

import math

import numpy as np

from stf.patterns.component import Kind


def counts(parts, n):
    """The number of keys in the union of `parts` of each of `n` query positions, int64 `[n]`."""
    # Rows with the same columns are counted together: all of them, unless there are block layouts.
    edges = {0, n}
    for part in parts:
        edges.update(range(0, n, part.a) if part.kind == Kind.BLOCKS else ())
    edges = sorted(edges)
    strides = _inclusion_exclusion([part.a for part in parts if part.kind == Kind.STRIDED], n)
    result = np.zeros(n, np.int64)
    for begin, end in zip(edges, edges[1:], strict=False):
        result[begin:end] = _counts_of_rows(parts, strides, begin, end)
    return result


def _inclusion_exclusion(strides, n):
    """{m: sign}: being a multiple of any stride is the signed sum of being a multiple of each m."""
    terms = {}
    for stride in strides:
        terms_of_stride = {min(stride, n): 1}
        for multiple, sign in terms.items():
            # From n on every multiple is alike: only the query itself is at such a distance.
            common = min(math.lcm(multiple, min(stride, n)), n)
            terms_of_stride[common] = terms_of_stride.get(common, 0) - sign
        for multiple, sign in terms_of_stride.items():
            terms[multiple] = terms.get(multiple, 0) + sign
    return {multiple: sign for multiple, sign in terms.items() if sign}


def _counts_of_rows(parts, strides, begin, end):
    """The counts of query positions `begin` to `end - 1`, over which no part's columns change."""
    i, j = np.arange(begin, end), np.arange(end)
    start = i + 1  # of the interval [start, i], empty so far
    columns = np.zeros(end, bool)
    for part in parts:
        if part.kind == Kind.CAUSAL:
            start = np.zeros_like(i)
        elif part.kind == Kind.LOCAL:
            start = np.minimum(start, np.maximum(0, i - part.a))
        elif part.kind == Kind.OWN_BLOCK:
            start = np.minimum(start, i - i % part.a)
        elif part.kind == Kind.SUMMARY:
            columns |= (part.b <= j % part.a) & (j % part.a < part.c)
        elif part.kind == Kind.BLOCKS:
            columns |= part.layout[begin // part.a, j // part.a]
    before = np.concatenate([[0], np.cumsum(columns)])  # before[j]: columns among positions 0 ... j-1
    result = i + 1 - start + before[start]
    for stride, sign in strides.items():
        # along[t, r]: positions r, r + stride, ..., r + t * stride that are not columns.
        along = np.zeros((-(-end // stride), stride), np.int64)
        along.reshape(-1)[:end] = ~columns
        along = np.cumsum(along, axis=0).reshape(-1)
        last = i - stride * ((i - start + stride) // stride)  # the largest position before start
        result += sign * np.where(last >= 0, along[last], 0)
    return result
