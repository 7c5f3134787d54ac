"""Checks of layers' arguments: an error states the constraint and the value received."""

import numbers
from typing import Any


def positive(name: str, value: Any) -> int:
    """`value`, as an int, where it is one of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be an int, 1 or more. Received: {name}={value!r}")
    return int(value)


def key_value_heads(number: Any, num_heads: int) -> int:
    """The number of heads of key and value, `num_heads` where it is None, where it divides `num_heads`."""
    found = num_heads if number is None else positive("num_key_value_heads", number)
    if num_heads % found:
        raise ValueError(
            f"`num_key_value_heads` must divide num_heads={num_heads}. Received: num_key_value_heads={number}"
        )
    return found


def positives(name: str, values: Any) -> tuple[int, ...]:
    """`values` as a tuple of ints, where they are one or more of 1 or more."""
    try:
        values = tuple(values)
    except TypeError:
        raise ValueError(f"`{name}` must be a list of ints. Received: {name}={values!r}") from None
    if not values:
        raise ValueError(f"`{name}` must have an axis at least. Received: {name}={values!r}")
    return tuple(positive(name, value) for value in values)


def rate(name: str, value: Any) -> float:
    """`value`, as a float, where it is a number from 0 to less than 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < 1:
        raise ValueError(f"`{name}` must be a number from 0 to less than 1. Received: {name}={value!r}")
    return float(value)


def above_zero(name: str, value: Any) -> float:
    """`value`, as a float, where it is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) > 0:
        raise ValueError(f"`{name}` must be above 0. Received: {name}={value!r}")
    return float(value)


def seed_or_none(seed: Any) -> int | None:
    """`seed`, as an int, where it is one of 32 bits; None stays."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**32:
        raise ValueError(f"`seed` must be an int from 0 to 2**32 - 1, or None. Received: seed={seed!r}")
    return int(seed)
