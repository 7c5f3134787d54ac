"""How the positions of a sequence lie on several devices, and what attention then reads across them.

Each of k devices has as many positions, m, one after another: chunk s begins at `s * m`. What a pattern reads beyond
its chunk says how a block runs it:

-   Every stride a multiple of one number: positions are dealt out by their remainders instead. What a query reads then
    lies where the query is, and the block's stream is transposed before and after (`Remainders`).
-   Nothing farther back than some positions: those of the chunk before are put in front (`Halo`).
-   Own blocks and columns of earlier ones: the columns' keys and values are gathered (`Columns`).
-   Anything else: each device takes some of the heads, for all positions (`Heads`).
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from stf.patterns.blocks import Blocks
from stf.patterns.component import Kind
from stf.patterns.per_head import PerHead
from stf.patterns.strided import Strided
from stf.patterns.union import Union
from stf.patterns.validation import LARGEST


class Sizes(NamedTuple):
    """Of a block on several devices, for `sent`: what is counted in.

    Attributes:
        chunk: positions of a device.
        devices: how many.
        model_dim: width of the stream.
        num_heads, key_dim, value_dim: of the attention.
    """

    chunk: int
    devices: int
    model_dim: int
    num_heads: int
    key_dim: int
    value_dim: int


MOST_LAYOUT = 2**26  # blocks of a layout that `Columns` makes


@dataclasses.dataclass(frozen=True)
class Remainders:
    """Device j of k has the positions p with `j r <= p mod modulus < (j + 1) r`, where r is `modulus / k`.

    Attributes:
        modulus: a multiple of the number of devices.
        patterns: what each device runs, on its own positions.
    """

    modulus: int
    patterns: tuple

    def sent(self, sizes):
        """Numbers that all devices together send in a block's forward pass, and so in its backward pass, a sequence.

        Here the stream to the dealt order and back, which blocks of the same order one behind another share.
        """
        return 2 * sizes.chunk * (sizes.devices - 1) * sizes.model_dim


@dataclasses.dataclass(frozen=True)
class Halo:
    """A device also has the positions before its chunk; the first one has as many at its end, which nobody reads.

    Attributes:
        positions: how many.
        patterns: what each device runs, on its halo and its chunk.
    """

    positions: int
    patterns: tuple

    def sent(self, sizes):
        """As `Remainders.sent`: the halo's stream."""
        return self.positions * (sizes.devices - 1) * sizes.model_dim


@dataclasses.dataclass(frozen=True)
class Columns:
    """A device also has keys and values of columns of all blocks on the devices before it.

    Attributes:
        stride: length of a block.
        columns: for each head, ranges (first, last + 1) within a block.
        patterns: what each device runs, on the columns and its chunk.
    """

    stride: int
    columns: tuple
    patterns: tuple

    @property
    def count(self):
        """Columns of a block."""
        return sum(end - first for first, end in self.columns[0])

    def sent(self, sizes):
        """As `Remainders.sent`: keys and values of a device's columns, to all behind it."""
        columns = sizes.chunk // self.stride * self.count
        pairs = sizes.devices * (sizes.devices - 1) // 2
        return pairs * columns * sizes.num_heads * (sizes.key_dim + sizes.value_dim)


@dataclasses.dataclass(frozen=True)
class Heads:
    """A device has some of the heads, of all positions.

    Attributes:
        heads: for each device, how many.
        patterns: what each device runs; None where it has no head.
    """

    heads: tuple
    patterns: tuple

    def sent(self, sizes):
        """As `Remainders.sent`: queries, keys and values there, heads' outputs back."""
        width = sizes.num_heads * 2 * (sizes.key_dim + sizes.value_dim)
        return (sizes.devices - 1) * sizes.chunk * width


def positions_of_device(patterns, num_heads, positions, devices):
    """How many positions each device has: a multiple of what the patterns need, where they are long enough for it.

    Args:
        patterns: the patterns of all blocks.
        num_heads: heads of each block.
        positions: of a sequence, 1 or more; all devices' together may be more: the last ones' are then padding, and
            where a sequence is shorter than some devices need, the last devices may have none of its own.
        devices: number of devices.
    """
    unit = functools.reduce(math.lcm, (_unit(pattern, num_heads, devices) for pattern in patterns), 1)
    chunk = -(-positions // (devices * unit)) * unit
    # With a multiple that leaves a device nothing but padding, no pattern gets its own.
    return chunk if chunk * (devices - 1) < positions else -(-positions // devices)


def partition(pattern, num_heads, positions, chunk, devices):
    """How a block runs a pattern on several devices: a `Remainders`, `Halo`, `Columns` or `Heads`.

    Args:
        pattern: a `Pattern`.
        num_heads: number of heads.
        positions: of a sequence.
        chunk: of each device, see `positions_of_device`.
        devices: number of devices.

    Raises:
        ValueError: a pattern that does not serve so many positions or heads.
    """
    pattern.check_heads(num_heads)
    pattern.check_positions(positions)
    heads = [tuple(pattern._whole_components(head)) for head in range(num_heads)]
    size = chunk, devices
    found = _remainders(pattern, heads, *size) or _halo(pattern, heads, *size) or _columns(pattern, heads, *size)
    return found or _heads(pattern, num_heads, devices)


def _unit(pattern, num_heads, devices):
    """What a device's positions must be a multiple of for a pattern to need few of the others'."""
    parts = {part for head in range(num_heads) for part in pattern._whole_components(head)}
    modulus = _modulus(parts, devices)
    if modulus:
        return modulus
    if any(part.kind in (Kind.CAUSAL, Kind.STRIDED) or part.a == LARGEST for part in parts):
        return 1
    sizes = [part.a for part in parts if part.kind in (Kind.OWN_BLOCK, Kind.SUMMARY, Kind.BLOCKS)]
    counts = {part.c - part.b for part in parts if part.kind == Kind.SUMMARY}
    unit = math.lcm(*sizes)
    # The columns of a device's blocks fill whole blocks in front of another one's.
    return unit * unit // math.gcd(unit, *counts) if len(counts) == 1 else unit


def _modulus(parts, devices):
    """What all strides are multiples of, where there is nothing else and the devices can share it; else 0."""
    if any(part.kind != Kind.STRIDED for part in parts):
        return 0
    modulus = math.gcd(*(part.a for part in parts))
    return 0 if modulus % devices else modulus


def _of_leaves(pattern, num_heads, change):
    """A pattern each of whose leaves is changed: by a function of the leaf and its component."""

    def of_head(head):
        return Union([change(leaf, leaf._component()) for leaf in pattern.for_head(head)._leaves()])

    return PerHead([of_head(head) for head in range(num_heads)])


def _remainders(pattern, heads, chunk, devices):
    modulus = _modulus({part for parts in heads for part in parts}, devices)
    if not modulus or chunk % modulus:
        return None
    own = _of_leaves(pattern, len(heads), lambda leaf, part: Strided(part.a // devices))
    return Remainders(modulus, (own,) * devices)


def _halo(pattern, heads, chunk, devices):
    parts = {part for of_head in heads for part in of_head}
    begins = [s * chunk for s in range(1, devices)]
    positions = max([0, *(begin - _first_key(part, begin, chunk) for part in parts for begin in begins)])
    unit = math.lcm(*(part.a for part in parts if part.kind in (Kind.OWN_BLOCK, Kind.BLOCKS)))
    positions = -(-positions // unit) * unit
    # What is put in front is computed with the chunk, and thrown away.
    if positions > chunk // 2 or chunk % unit:
        return None

    def of_device(s):
        first, size = max(0, s * chunk - positions), chunk + positions

        def seen(leaf, part):
            if part.kind != Kind.BLOCKS:
                return leaf  # the same from wherever one looks, from a block's beginning on
            rows = slice(first // part.a, -(-(first + size) // part.a))
            layout = np.zeros((rows.stop - rows.start,) * 2, bool)
            within = part.layout[rows, rows]
            layout[: len(within), : len(within)] = within
            return Blocks(layout, part.a)

        return _of_leaves(pattern, len(heads), seen)

    return Halo(positions, tuple(map(of_device, range(devices))))


def _first_key(part, begin, chunk):
    """A position that no key lies before, of queries from `begin` on, `chunk` of them; exact where it is not 0."""
    if part.kind == Kind.LOCAL:
        return max(0, begin - part.a)
    if part.kind == Kind.OWN_BLOCK:
        return begin // part.a * part.a
    if part.kind == Kind.BLOCKS:
        rows = part.layout[begin // part.a : -(-(begin + chunk) // part.a)]
        used = np.flatnonzero(rows.any(axis=0))
        return min(begin, int(used[0]) * part.a) if len(used) else begin
    return 0


def _columns(pattern, heads, chunk, devices):
    parts = {part for of_head in heads for part in of_head}
    strides = {part.a for part in parts if part.kind == Kind.SUMMARY}
    if len(strides) != 1 or any(part.kind not in (Kind.OWN_BLOCK, Kind.SUMMARY) or chunk % part.a for part in parts):
        return None
    [stride] = strides
    columns = tuple(_ranges([part for part in of_head if part.kind == Kind.SUMMARY]) for of_head in heads)
    counts = {sum(end - first for first, end in of_head) for of_head in columns}
    if len(counts) != 1 or 0 in counts:
        return None
    [count] = counts
    unit = math.lcm(*(part.a for part in parts))
    own, rows = chunk // stride * count // unit, chunk // unit  # in units: columns of a device, and its chunk
    if chunk // stride * count % unit or ((devices - 1) * own + rows) ** 2 > MOST_LAYOUT:
        return None

    def of_device(s):
        if not s:
            return pattern
        layout = np.zeros((s * own + rows,) * 2, bool)
        layout[s * own :, : s * own] = True
        return _of_leaves(pattern, len(heads), lambda leaf, _: leaf | Blocks(layout, unit))

    return Columns(stride, columns, tuple(map(of_device, range(devices))))


def _ranges(parts):
    """Ranges of columns, none of which overlap, of summary components of one stride."""
    found = []
    for first, end in sorted((part.b, part.c) for part in parts):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return tuple(found)


def _heads(pattern, num_heads, devices):
    begins = [s * num_heads // devices for s in range(devices + 1)]
    owned = [range(begin, end) for begin, end in itertools.pairwise(begins)]
    patterns = tuple(PerHead([pattern.for_head(head) for head in own]) if own else None for own in owned)
    return Heads(tuple(map(len, owned)), patterns)
