"""Checks of the arguments of patterns; an error states the constraint and the value received."""

import operator
from typing import Any

import numpy as np

# Every size fits 32 bits, so that 64 hold any sum or product of two that a kernel may need.
LARGEST = 2**31 - 1


def integer(name: str, value: Any, least: int) -> int:
    """`value` as an int, or ValueError unless it is an integer and `least <= value < 2**31`.

    Args:
        name: name of the argument, for the message.
        value: an int or a NumPy integer. Booleans and floats are refused, whole or not.
        least: smallest value allowed.
    """
    constraint = f"`{name}` must be an integer, {least} or more"
    if isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{constraint}. Received: {name}={value!r} (a boolean)")
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{constraint}. Received: {name}={value!r} (of type {type(value).__name__})") from None
    if number < least:
        raise ValueError(f"{constraint}. Received: {name}={number}")
    if number > LARGEST:
        raise ValueError(f"`{name}` must be less than 2**31. Received: {name}={number}")
    return number
