"""The Sparse Transformer's attention in PyTorch: FlexAttention for local and fixed, SDPA for dense and strided."""

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention


def local_mask(l):
    """Keys i-l to i."""
    return lambda b, h, i, j: (j <= i) & (i - j <= l)


def fixed_mask(l, c):
    """Own block of l, and c columns of every block so far; each head has its own columns, counted from the end."""

    def mask(b, h, i, j):
        end = l - c * (h % (l // c))
        summary = (j % l >= end - c) & (j % l < end)
        return (j <= i) & ((i // l == j // l) | summary)

    return mask


def flex(mask, length, num_heads, device):
    make = torch.compile(create_block_mask) if device == "cuda" else create_block_mask  # eager, it holds n x n bools
    block_mask = make(mask, None, num_heads, length, length, device=device)

    def attend(query, key, value):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return flex_attention(*heads_first, block_mask=block_mask).transpose(1, 2)

    return attend


def dense(query, key, value):
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def strided(l):
    """Keys i, i-l, i-2l, ...: causal attention among the n/l positions of each column of a matrix of width l."""

    def attend(query, key, value):
        b, n, heads, _ = query.shape
        columns = (x.reshape(b, n // l, l * heads, -1) for x in (query, key, value))
        return dense(*columns).reshape(b, n, heads, -1)

    return attend


def attentions(kind, length, num_heads, stride, summary, device):
    """What the blocks take in turn; each a function of query, key and value `[batch, position, head, depth]`."""
    if length % stride:
        raise ValueError(f"length must be a multiple of stride. Received: length={length}, stride={stride}")
    if kind == "strided":
        return [flex(local_mask(stride), length, None, device), strided(stride)]
    if kind == "fixed":
        return [flex(fixed_mask(stride, summary), length, num_heads, device)]
    if kind == "dense":
        return [dense]
    raise ValueError(f"kind must be strided, fixed or dense. Received: kind={kind!r}")
