"""Checks of layers' arguments: an error states the constraint and the value received."""

import numbers


def positive(name, value):
    """`value`, as an int, where it is one of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be an int, 1 or more. Received: {name}={value!r}")
    return int(value)
