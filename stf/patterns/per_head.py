"""A pattern of its own for each head."""

from collections.abc import Iterable
from typing import Any, Self

from stf.patterns.pattern import Pattern
from stf.patterns.serialization import deserialize, serialize
from stf.patterns.union import check_patterns


class PerHead(Pattern):
    """Multi-head sparse attention: head h uses `patterns[h mod len(patterns)]`.

    The third integration of factorised attention (Eq. 8 of Child et al. 2019).

    Examples:
        >>> pattern = stf.patterns.PerHead([stf.patterns.Local(2), stf.patterns.Strided(3)])
        >>> pattern.keys(7, head=0), pattern.keys(7, head=1)
        (array([5, 6, 7]), array([1, 4, 7]))

    Args:
        patterns: patterns, at least one. One that differs between heads itself is asked for head h.

    Raises:
        ValueError: if `patterns` is empty or has something in it that is not a pattern.
    """

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self.patterns = check_patterns("patterns", patterns)

    def get_config(self) -> dict[str, Any]:
        """The arguments as plain data: `patterns` as `serialize` gives them; a subclass's own `_arguments`."""
        if self._arguments:
            return super().get_config()
        return {"patterns": [serialize(pattern) for pattern in self.patterns]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The pattern whose `get_config` gave `config`."""
        if cls._arguments:
            return super().from_config(config)
        return cls([deserialize(pattern) for pattern in config["patterns"]])

    def _for_head(self, head):
        return self.patterns[head % len(self.patterns)].for_head(head)

    def _check_positions(self, n):
        for pattern in self.patterns:
            pattern.check_positions(n)

    def _check_heads(self, num_heads):
        for pattern in self.patterns[:num_heads]:
            pattern.check_heads(num_heads)

    def _identity(self):
        return self.patterns

    def __repr__(self):
        """The expression that makes the pattern."""
        if self._arguments:
            return super().__repr__()
        return f"{type(self).__name__}({[*self.patterns]!r})"
