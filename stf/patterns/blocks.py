"""Any block-sparse layout."""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from stf.patterns.component import Component, Kind
from stf.patterns.pattern import Pattern
from stf.patterns.validation import integer


class Blocks(Pattern):
    """Any layout of blocks: `{j <= i : layout[floor(i / block_size), floor(j / block_size)]}`.

    Blocks above the diagonal are never attended to, whatever the layout says, and blocks on the
    diagonal as far as the query. (The block-sparse attention of Section 5.5 of Child et al. 2019.)

    Examples:
        >>> stf.patterns.Blocks([[True, False], [True, False]], block_size=2).keys(3)
        array([0, 1])

    Args:
        layout: bool array, `[blocks, blocks]` for all heads or `[heads, blocks, blocks]` with one
            layout a head, where `blocks = ceil(n / block_size)` for sequences of n positions. It is
            copied.
        block_size: length of a block, 1 or more.

    Raises:
        ValueError: if `layout` is not a square bool array of two or three dimensions with at least
            one block (and head), or `block_size` is not an integer or less than 1; later, if it is
            used with a length or a number of heads that it was not made for.
    """

    def __init__(self, layout: npt.ArrayLike, block_size: int) -> None:
        try:
            layout = np.array(layout)
        except ValueError as error:
            raise ValueError(f"`layout` must be a bool array. Received: {error}") from None
        if layout.dtype != np.bool_:
            raise ValueError(f"`layout` must be a bool array. Received: layout of dtype {layout.dtype}")
        if layout.ndim not in (2, 3) or layout.shape[-1] != layout.shape[-2] or not layout.size:
            raise ValueError(
                "`layout` must have shape [blocks, blocks] or [heads, blocks, blocks], none 0. "
                f"Received: layout of shape {layout.shape}"
            )
        layout.flags.writeable = False
        self.layout = layout
        self.block_size = integer("block_size", block_size, 1)
        self._hash = None

    @classmethod
    def from_rule(cls, rule: Callable[[np.ndarray, np.ndarray], npt.ArrayLike], n: int, block_size: int) -> Self:
        """The layout for n positions that a rule says.

        Examples:
            >>> stf.patterns.Blocks.from_rule(lambda row, column: row - column != 1, n=8, block_size=2).keys(7)
            array([0, 1, 2, 3, 6, 7])

        Args:
            rule: function of block indices of queries, int array `[blocks, 1]`, and of keys, `[1, blocks]`, that
                returns bools which broadcast to `[blocks, blocks]`, or to `[heads, blocks, blocks]`.
            n: number of positions, 1 or more.
            block_size: length of a block, 1 or more.

        Returns:
            A `Blocks`.

        Raises:
            ValueError: if `n` or `block_size` is not an integer or less than 1, or the rule returns something else.
        """
        block_size = integer("block_size", block_size, 1)
        blocks = -(-integer("n", n, 1) // block_size)
        layout = np.asarray(rule(np.arange(blocks)[:, None], np.arange(blocks)[None, :]))
        try:
            layout = np.broadcast_to(layout, (*layout.shape[:-2], blocks, blocks))
        except ValueError:
            raise ValueError(
                f"`rule` must return bools that broadcast to {blocks} x {blocks} blocks. "
                f"Received: an array of shape {layout.shape}"
            ) from None
        return cls(layout, block_size)

    @property
    def blocks(self) -> int:
        """Number of blocks that the layout divides a sequence into."""
        return self.layout.shape[-1]

    def get_config(self) -> dict[str, Any]:
        """The arguments as plain data: `layout` in rows of "0" and "1"."""

        def rows(layout):
            return ["".join(map(str, row.astype(int))) for row in layout]

        layout = self.layout
        return {
            "layout": rows(layout) if layout.ndim == 2 else [rows(of_head) for of_head in layout],
            "block_size": self.block_size,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The pattern of a config, its `layout` in rows of "0" and "1", or as an array."""
        layout = config["layout"]

        def bits(row):
            if not isinstance(row, str):
                return [bits(each) for each in row] if isinstance(row, (list, tuple)) else row
            if set(row) - set("01"):
                raise ValueError(f'A row of `layout` must be made of "0" and "1". Received: {row!r}')
            return [each == "1" for each in row]

        return cls(bits(layout), **{key: value for key, value in config.items() if key != "layout"})

    def _for_head(self, head):
        if self.layout.ndim == 2:
            return self
        if head >= len(self.layout):
            raise ValueError(
                f"`head` must be less than the layout's number of heads, {len(self.layout)}. Received: head={head}"
            )
        return self._with(layout=self.layout[head])

    def _check_positions(self, n):
        if n and -(-n // self.block_size) != self.blocks:
            raise ValueError(
                f"`layout` of {self.blocks} x {self.blocks} blocks of {self.block_size} serves "
                f"{(self.blocks - 1) * self.block_size + 1} to {self.blocks * self.block_size} "
                f"positions. Received: n={n}"
            )

    def _check_heads(self, num_heads):
        if self.layout.ndim == 3 and len(self.layout) != num_heads:
            raise ValueError(
                f"`layout` must have one layout for each of num_heads={num_heads} heads. "
                f"Received: layout of shape {self.layout.shape}"
            )

    def _check_position(self, i):
        if i >= self.blocks * self.block_size:
            raise ValueError(
                f"`i` must lie within the layout's {self.blocks} blocks of {self.block_size}. Received: i={i}"
            )

    def _keys(self, i):
        self._check_position(i)
        row = i // self.block_size
        begins = np.flatnonzero(self.layout[row, : row + 1]) * self.block_size
        keys = (begins[:, None] + np.arange(self.block_size)).reshape(-1)
        return keys[keys <= i]

    def _mask(self, i, j):
        return self.layout[i // self.block_size, j // self.block_size]

    def _component(self):
        return Component(Kind.BLOCKS, self.block_size, 0, self.blocks, layout=self.layout)

    def _identity(self):
        return self.layout.shape, self.layout.tobytes(), self.block_size

    def __hash__(self):
        """Equal for equal patterns. Worked out once: the layout may be large."""
        if self._hash is None:
            self._hash = super().__hash__()
        return self._hash

    def __repr__(self):
        """The layout's shape and number of blocks in use, not the layout."""
        shape = " x ".join(map(str, self.layout.shape))
        used = int(np.tril(self.layout).sum())
        whole = self.layout.size // self.blocks * (self.blocks + 1) // 2
        return f"Blocks(layout=<{shape}, {used} of {whole} blocks>, block_size={self.block_size})"
