"""The base class of every pattern: what a query position may attend to, and what that costs."""

import copy
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from stf.patterns import counting, lowering
from stf.patterns.component import Component, check_whole
from stf.patterns.validation import integer


class Pattern:
    """A set of keys for each query position and head; causal, `j <= i` for each key j of query i.

    A pattern is immutable, hashable and independent of the sequence length. Patterns combine:
    `p | q` is their union (Eq. 7 of Child et al. 2019, "merged"), and `PerHead([p, q])` gives each
    head its own (Eq. 8). Subclasses that are not a combination are *leaves*.

    A leaf of one's own defines `_keys` and `_mask`, names its constructor's arguments in `_arguments`
    and keeps each as an attribute of that name. It can then be looked at (`keys`, `mask`, `hops`) and
    run by `stf.ops.reference_attention`. To be counted and run by `stf.ops.attention` it also says in
    `_component` the same set as the kernels know it; one that has no such form cannot be run by them,
    alone or in a union, and NotImplementedError says so. A subclass of a leaf or of a combination may
    add to it; if it changes the set (`_keys`, `_mask`) it is a leaf of its own, whose `_component` must
    be said anew. `register` makes a class known to `deserialize`, and so to models that are loaded.

    Examples:
        >>> pattern = stf.patterns.Local(2) | stf.patterns.Strided(3)
        >>> pattern.keys(7)
        array([1, 4, 5, 6, 7])
        >>> pattern.pairs(8)
        28
        >>> pattern.mask(3).astype(int)
        array([[1, 0, 0],
               [1, 1, 0],
               [1, 1, 1]])
    """

    def for_head(self, head: int) -> "Pattern":
        """The pattern of head `head` alone, the same for whatever head it is then asked about."""
        return self._for_head(integer("head", head, 0))

    def keys(self, i: int, head: int = 0) -> npt.NDArray[np.int64]:
        """The keys that query position `i` attends to, ascending.

        Args:
            i: query position, 0 or more.
            head: head, 0 or more.

        Returns:
            int64 array, `[number of keys]`; empty where the position may attend to nothing.
        """
        i = integer("i", i, 0)
        leaves = self.for_head(head)._leaves()
        if len(leaves) == 1:
            return leaves[0]._keys(i)
        return np.unique(np.concatenate([leaf._keys(i) for leaf in leaves]))

    def mask(self, n: int, head: int = 0) -> npt.NDArray[np.bool_]:
        """The whole set as a matrix: for pictures, tests and the dense reference.

        Args:
            n: number of positions, 0 or more.
            head: head, 0 or more.

        Returns:
            bool array, `[n, n]`: row `i` is true at the keys of query `i`.
        """
        n = integer("n", n, 0)
        self.check_positions(n)
        i, j = np.arange(n)[:, None], np.arange(n)[None, :]
        mask = np.zeros((n, n), bool)
        for leaf in self.for_head(head)._leaves():
            mask |= leaf._mask(i, j)
        return mask & (j <= i)

    def counts(self, n: int, head: int = 0) -> npt.NDArray[np.int64]:
        """The number of keys of each query, int64 `[n]`: `mask(n, head).sum(axis=1)` in O(n)."""
        n = integer("n", n, 0)
        self.check_positions(n)
        return counting.counts(self._whole_components(head), n)

    def pairs(self, n: int, head: int = 0) -> int:
        """The exact number of (query, key) pairs of one head: `mask(n, head).sum()`.

        Takes O(n) memory, and O(n) time (O(n * blocks) where a block layout takes part).
        """
        return int(self.counts(n, head).sum())

    def flops(
        self, n: int, key_dim: int, value_dim: int, num_heads: int = 1, batch: int = 1, backward: bool = False
    ) -> int:
        """Floating-point operations of attention, a multiply-add being two, softmax not counted.

        Forward, `2 (key_dim + value_dim)` a pair: the scores and the weighted sum of values.
        Backward, with the scores computed again from the log-sum-exp, adds `2 (3 key_dim + 2
        value_dim)` a pair.

        Args:
            n: number of positions.
            key_dim: depth of each head's query and key.
            value_dim: depth of each head's value.
            num_heads: number of heads.
            batch: number of sequences.
            backward: whether to count forward and backward, rather than forward alone.

        Returns:
            The exact count, an int.
        """
        key_dim, value_dim = integer("key_dim", key_dim, 1), integer("value_dim", value_dim, 1)
        batch = integer("batch", batch, 0)
        a_pair = 2 * (key_dim + value_dim)
        if backward:
            a_pair += 2 * (3 * key_dim + 2 * value_dim)
        seen: dict[Pattern, int] = {}
        for head in range(integer("num_heads", num_heads, 1)):
            of_head = self.for_head(head)
            seen[of_head] = seen.get(of_head, 0) + 1
        return batch * a_pair * sum(of_head.pairs(n) * heads for of_head, heads in seen.items())

    def bytes(
        self,
        n: int,
        key_dim: int,
        value_dim: int,
        num_heads: int = 1,
        batch: int = 1,
        itemsize: int = 4,
        backward: bool = False,
    ) -> int:
        """The least that attention must move to and from memory, in bytes.

        Forward reads query, key and value once and writes the output and the float32 log-sum-exp.
        Backward adds reading query, key, value, output, its gradient and the log-sum-exp, and
        writing three gradients.

        Args:
            n: number of positions.
            key_dim: depth of each head's query and key.
            value_dim: depth of each head's value.
            num_heads: number of heads.
            batch: number of sequences.
            itemsize: bytes of one number of the inputs: 4 for float32, 2 for bfloat16 and float16.
            backward: whether to count forward and backward, rather than forward alone.

        Returns:
            The number of bytes, an int.
        """
        key_dim, value_dim = integer("key_dim", key_dim, 1), integer("value_dim", value_dim, 1)
        itemsize = integer("itemsize", itemsize, 1)
        rows = integer("batch", batch, 0) * integer("n", n, 0) * integer("num_heads", num_heads, 1)
        a_row = itemsize * (2 * key_dim + 2 * value_dim) + 4
        if backward:
            a_row += itemsize * (4 * key_dim + 4 * value_dim) + 4
        return rows * a_row

    def components(self, head: int = 0) -> tuple[Component, ...]:
        """What the kernels run for one head: disjoint `Component`s whose union is the pattern."""
        return lowering.components(self._whole_components(head))

    def _whole_components(self, head):
        """The components of one head's leaves, which may overlap."""
        return [check_whole(leaf._component()) for leaf in self.for_head(head)._leaves()]

    def check_positions(self, n: int) -> None:
        """Raises ValueError where a block layout was made for another number of positions."""
        self._check_positions(integer("n", n, 0))

    def check_heads(self, num_heads: int) -> None:
        """Raises ValueError where a block layout was made for another number of heads."""
        self._check_heads(integer("num_heads", num_heads, 1))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as plain data (int, str, list, dict, None), fit for JSON."""
        return {name: getattr(self, name) for name in self._arguments}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The pattern whose `get_config` gave `config`."""
        return cls(**config)

    # What a subclass defines. Its constructor's arguments, which are also attributes, by name:
    _arguments: tuple[str, ...] = ()

    def _for_head(self, head):
        return self

    def _check_positions(self, n):
        pass

    def _check_heads(self, num_heads):
        pass

    def _leaves(self):
        """The patterns without parts whose union this is. Only asked of what `for_head` returns."""
        return (self,)

    def _keys(self, i):
        """A leaf's keys of query `i`, ascending, int64."""
        raise NotImplementedError

    def _mask(self, i, j):
        """A leaf's set for broadcast query positions `i` and key positions `j <= i`."""
        raise NotImplementedError

    def _component(self):
        """A leaf's set as the kernels know it: a `Component`, whole as `check_whole` has it."""
        raise NotImplementedError(
            f"{type(self).__name__} must define `_component`, the stf.patterns.Component of the set of its `_keys` and "
            f"`_mask`, to be counted or run by stf.ops.attention. Received: pattern={self!r}"
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes a class that changes the set a leaf without a component, unless it says that too."""
        super().__init_subclass__(**kwargs)

        def depth(name):
            return next(at for at, base in enumerate(cls.__mro__) if name in vars(base))

        changed = min(map(depth, ("_keys", "_mask", "keys", "mask")))
        for name in ("_leaves", "_component"):
            if depth(name) > changed:
                setattr(cls, name, vars(Pattern)[name])

    def _with(self, **attributes):
        """A copy with other attributes, whatever its class's constructor takes."""
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def _identity(self):
        """What identifies a pattern beside its class; hashable."""
        return tuple(vars(self).items())

    def __or__(self, other: "Pattern") -> "Pattern":
        """The union of both."""
        from stf.patterns.union import Union

        if not isinstance(other, Pattern):
            return NotImplemented
        return Union([self, other])

    def __eq__(self, other: object) -> bool:
        """Whether both are of one class with equal arguments."""
        if type(self) is not type(other):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        """Equal for equal patterns."""
        return hash((type(self).__name__, self._identity()))

    def __repr__(self) -> str:
        """The expression that makes the pattern."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"
