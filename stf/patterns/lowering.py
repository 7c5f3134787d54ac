"""From patterns to what the kernels run: disjoint components, packed for the op."""

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from stf.patterns.component import Component, Kind, covers
from stf.patterns.validation import LARGEST, integer

if TYPE_CHECKING:
    from stf.patterns.pattern import Pattern


class Program(NamedTuple):
    """All heads' components, packed for the op. Head h runs program `h mod programs`.

    Attributes:
        components: records of six ints: kind, a, b, c, d, exclude.
        program_begin: `[programs + 1]`, index of each program's first record, then their number.
        layouts: the bits of all block layouts, row-major, least significant bit first; each begins
            a byte, and a record's b is the index of its first bit.
    """

    components: list
    program_begin: list
    layouts: bytes


def programs(pattern, num_heads):
    """The components of each program of a pattern: head h has those of program `h mod programs`.

    Args:
        pattern: a `Pattern`.
        num_heads: number of heads, 1 or more.

    Returns:
        A list of tuples of `Component`s, as few as the heads differ in a repeating order.
    """
    num_heads = integer("num_heads", num_heads, 1)
    pattern.check_heads(num_heads)
    of_heads = [pattern.components(head) for head in range(num_heads)]
    period = next(
        p for p in range(1, num_heads + 1) if all(of_heads[head] == of_heads[head % p] for head in range(num_heads))
    )
    return of_heads[:period]


def lower(pattern: "Pattern", num_heads: int, restart: bool = False) -> Program:
    """Packs a pattern for the op.

    Args:
        pattern: a `Pattern`.
        num_heads: number of heads, 1 or more.
        restart: whether positions are counted from each document's first one on.

    Returns:
        A `Program` with as few programs as the heads differ in a repeating order.

    Raises:
        ValueError: if a block layout has one layout a head, but not `num_heads` of them.
    """
    records, begin, layouts, places = [], [0], bytearray(), {}
    for of_head in programs(pattern, num_heads):
        for part in of_head:
            b = part.b
            if part.layout is not None:
                bits = np.packbits(part.layout.reshape(-1), bitorder="little").tobytes()
                if (part.c, bits) not in places:
                    places[part.c, bits] = 8 * len(layouts)
                    layouts += bits
                b = places[part.c, bits]
            kind, d = restarted(part) if restart else (part.kind, part.d)
            records += [int(kind), part.a, b, part.c, d, part.exclude]
        begin.append(len(records) // 6)
    return Program(records, begin, bytes(layouts))


def restarted(part):
    """Kind and d of a component whose blocks are counted from each document's first position on."""
    if part.kind == Kind.SUMMARY:
        return Kind.COLUMNS, part.d
    return part.kind, 1 if part.kind in (Kind.OWN_BLOCK, Kind.BLOCKS) else part.d


def components(parts):
    """The disjoint components whose union is that of `parts`, the components of one head's leaves.

    Everything that closed forms can tell is told by them: what lies in another part is dropped,
    parts of one kind are merged where their union is of that kind, and a strided part begins behind
    the local one (b), a summary part behind its own block, and one of a single block behind the
    local one (d). Only where two parts may still overlap does the later one exclude the earlier.
    Dense kinds come first, so that it is the sparse ones that pay for a mask.
    """
    parts = _simplify(parts)
    if len(parts) > 63:
        raise ValueError(
            f"A pattern must come down to 63 components or less for each head. Received: {len(parts)} components"
        )
    result = []
    for part in parts:
        exclude = sum(1 << t for t, other in enumerate(result) if not _disjoint(other, part))
        result.append(dataclasses.replace(part, exclude=exclude))
    return tuple(result)


def _simplify(parts):
    """Components that together are exactly the union of the leaves', but may overlap."""
    of = {kind: [part for part in parts if part.kind == kind] for kind in Kind}
    columns = _merge_columns(of[Kind.SUMMARY])
    everything = any(part.a == 1 for part in of[Kind.STRIDED]) or any(
        (first, end) == (0, stride) for stride, first, end in columns
    )
    if of[Kind.CAUSAL] or everything:
        return [Component(Kind.CAUSAL)]

    window = max((part.a for part in of[Kind.LOCAL]), default=-1)
    strides = _without_multiples({part.a for part in of[Kind.STRIDED]})
    sizes = {part.a for part in of[Kind.OWN_BLOCK] if part.a > window + 1}
    sizes = [m for m in sizes if not any(other % m == 0 for other in sizes if other != m)]
    if window == 0 and (strides or sizes):
        window = -1  # every one of those holds the query itself

    parts = [Component(Kind.LOCAL, window)] if window >= 0 else []
    parts += [Component(Kind.OWN_BLOCK, size) for size in sorted(sizes)]
    blocks = _block_components(of[Kind.BLOCKS], sizes, window)
    if parts or strides or columns or any(part.layout.any() for part in blocks):
        blocks = [part for part in blocks if part.layout.any()]
    else:
        blocks = blocks[:1]  # a head keeps one component, even one without a key
    parts += blocks
    for stride in strides:
        first = window // stride + 1  # behind the local window; 0 where there is none
        if sizes:
            first = max(first, 1)  # the own block holds the query itself
        parts.append(Component(Kind.STRIDED, stride, first))
    for stride, begin, end in columns:
        reach = stride - 1 - begin  # of the own block's columns
        covered = window >= reach or any(size % stride == 0 for size in sizes)
        # All blocks but the own one may lie in the window, unless there is no other.
        own = window + 2 if stride == LARGEST else 1
        parts.append(Component(Kind.SUMMARY, stride, begin, end, 0 if covered else own))
    return parts


def _without_multiples(strides):
    return sorted(m for m in strides if not any(m % other == 0 for other in strides if other != m))


def _merge_columns(summaries):
    """[(stride, first column, last + 1)]: ranges of one stride neither overlap nor touch."""
    merged = []
    for stride, first, end in sorted((part.a, part.b, part.c) for part in summaries):
        if merged and merged[-1][0] == stride and first <= merged[-1][2]:
            merged[-1][2] = max(end, merged[-1][2])
        else:
            merged.append([stride, first, end])
    return merged


def _block_components(parts, sizes, window):
    """A component for each shape of layout, less what the own blocks or the window cover."""
    layouts = {}
    for part in parts:
        key = part.a, part.c
        layouts[key] = layouts[key] | part.layout if key in layouts else part.layout
    result = []
    for (size, blocks), layout in sorted(layouts.items()):
        row, column = np.arange(blocks)[:, None], np.arange(blocks)[None, :]
        layout = layout & (column <= row) & ((row - column + 1) * size - 1 > window)
        for block in sizes:
            if block % size == 0:
                layout &= row // (block // size) != column // (block // size)
        result.append(Component(Kind.BLOCKS, size, 0, blocks, layout=layout))
    return result


def _disjoint(one, other):
    """Whether a closed form tells that two components of `_simplify`, in order, share no key."""
    pair = one.kind, other.kind
    if pair == (Kind.LOCAL, Kind.STRIDED):
        return True
    if pair == (Kind.LOCAL, Kind.SUMMARY):
        return other.d > one.a + 1
    if pair == (Kind.OWN_BLOCK, Kind.STRIDED):
        return other.b * other.a >= one.a
    if pair == (Kind.OWN_BLOCK, Kind.SUMMARY):
        return other.d == 0 and other.a % one.a == 0
    if pair == (Kind.LOCAL, Kind.BLOCKS):
        return _nearest(other) > one.a
    if pair == (Kind.OWN_BLOCK, Kind.BLOCKS):
        return one.a % other.a == 0 or _nearest(other) >= one.a
    if pair == (Kind.SUMMARY, Kind.SUMMARY):
        return one.a == other.a
    return False


def _nearest(blocks):
    """The least distance of a key from its query in a layout with one block at least."""
    row, column = np.nonzero(blocks.layout)
    return max(0, (int((row - column).min()) - 1) * blocks.a + 1)


def components_mask(program: Program, n: int, head: int = 0) -> npt.NDArray[np.bool_]:
    """The keys of each packed component of a head, as the op is told them; for tests.

    Args:
        program: a `Program`.
        n: number of positions.
        head: head, 0 or more.

    Returns:
        bool array, `[components, n, n]`: query, key.
    """
    p = head % (len(program.program_begin) - 1)
    records = np.reshape(program.components, (-1, 6))[program.program_begin[p] : program.program_begin[p + 1]].tolist()
    bits = np.unpackbits(np.frombuffer(program.layouts, np.uint8), bitorder="little").astype(bool)
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    sets = np.zeros((len(records), n, n), bool)
    for t, (kind, a, b, c, d, _) in enumerate(records):
        layout = bits[b : b + c * c].reshape(c, c) if kind == Kind.BLOCKS else None
        sets[t] = covers(Component(kind, a, b, c, d, layout=layout), i, j)
    sets &= j <= i
    result = sets.copy()
    for t, record in enumerate(records):
        for other in range(t):
            if record[5] >> other & 1:
                result[t] &= ~sets[other]
    return result
