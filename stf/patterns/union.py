"""The union of patterns."""

from collections.abc import Iterable
from typing import Any, Self

from stf.patterns.pattern import Pattern
from stf.patterns.serialization import deserialize, serialize


class Union(Pattern):
    """All keys of all `parts`, each once: merged heads (Eq. 7 of Child et al. 2019).

    `p | q` is `Union([p, q])`. Unions in `parts` are replaced by their own parts, repeated parts by
    one.

    Examples:
        >>> (stf.patterns.Local(1) | stf.patterns.Strided(3)).keys(6)
        array([0, 3, 5, 6])

    Args:
        parts: patterns, at least one.

    Raises:
        ValueError: if `parts` is empty or has something in it that is not a pattern.
    """

    def __init__(self, parts: Iterable[Pattern]) -> None:
        self.parts = _flat(check_patterns("parts", parts))

    def get_config(self) -> dict[str, Any]:
        """The arguments as plain data: `parts` as `serialize` gives them; a subclass's own `_arguments`."""
        if self._arguments:
            return super().get_config()
        return {"parts": [serialize(part) for part in self.parts]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The pattern whose `get_config` gave `config`."""
        if cls._arguments:
            return super().from_config(config)
        return cls([deserialize(part) for part in config["parts"]])

    def _for_head(self, head):
        return self._with(parts=_flat(part.for_head(head) for part in self.parts))

    def _check_positions(self, n):
        for part in self.parts:
            part.check_positions(n)

    def _check_heads(self, num_heads):
        for part in self.parts:
            part.check_heads(num_heads)

    def _leaves(self):
        return tuple(leaf for part in self.parts for leaf in part._leaves())

    def _identity(self):
        return self.parts

    def __repr__(self):
        """The expression that makes the pattern."""
        if self._arguments:
            return super().__repr__()
        if type(self) is Union and len(self.parts) > 1:
            return " | ".join(map(repr, self.parts))
        return f"{type(self).__name__}({[*self.parts]})"


def _flat(parts):
    """Each part once, those of unions in place of the unions."""
    flat = (each for part in parts for each in (part.parts if type(part) is Union else (part,)))
    return tuple(dict.fromkeys(flat))


def check_patterns(name: str, patterns: Iterable[Pattern]) -> tuple[Pattern, ...]:
    """`patterns` as a tuple, or ValueError unless they are patterns, one at least."""
    if isinstance(patterns, Pattern) or not hasattr(patterns, "__iter__"):
        raise ValueError(f"`{name}` must be a list of patterns. Received: {name}={patterns!r}")
    patterns = tuple(patterns)
    if not patterns or not all(isinstance(pattern, Pattern) for pattern in patterns):
        raise ValueError(f"`{name}` must be a list of one or more patterns. Received: {name}={[*patterns]!r}")
    return patterns
