"""Checks of the arguments of attention: an error states the constraint and the value received."""

import math

import numpy as np
import tensorflow as tf

from stf.patterns import Pattern


def check_tensors(query, key, value, pattern, dtypes):
    """Query, key and value as tensors that fit one another and the pattern.

    Args:
        query, key, value: what `attention` was called with.
        pattern: the same.
        dtypes: allowed dtypes.

    Returns:
        Three tensors, each with the static shape that all of them tell.

    Raises:
        ValueError: ranks, dtypes, shapes, heads or positions that do not fit, as far as static
            shapes tell.
    """
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a stf.patterns.Pattern. Received: pattern={pattern!r}")
    tensors = dict(query=query, key=key, value=value)
    sizes = {}  # lists: arithmetic of TensorShapes was half of the Python of an eager call
    for name, tensor in tensors.items():
        if tensor is None:
            raise ValueError(f"{name} must be a tensor. Received: {name}=None")
        tensors[name] = tensor = tf.convert_to_tensor(tensor)
        if tensor.dtype not in dtypes:
            names = ", ".join(dtype.name for dtype in dtypes)
            raise ValueError(f"{name} must have one of the dtypes {names}. Received: {name}={_words(tensor)}")
        if tensor.dtype is not tensors["query"].dtype:
            raise ValueError(
                f"{name} must have the query's dtype, {tensors['query'].dtype.name}. Received: {name}={_words(tensor)}"
            )
        rank = tensor.shape.rank
        if rank not in (None, 4):
            raise ValueError(f"{name} must be [batch, position, head, depth]. Received: {name}={_words(tensor)}")
        sizes[name] = [None] * 4 if rank is None else tensor.shape.as_list()
    query, key, value = tensors.values()
    batch, positions, heads, depth = sizes["query"]
    key_heads = sizes["key"][2]
    for name, number in (("query", heads), ("key", key_heads)):
        if number is None:
            raise ValueError(f"{name} must have a static number of heads. Received: {name}={_words(tensors[name])}")
    if key_heads != heads and (key_heads == 0 or heads == 0 or heads % key_heads):
        raise ValueError(
            f"key must have a number of heads that divides the query's, {heads}. Received: key={_words(key)}"
        )
    for name, wanted in (
        ("key", [batch, positions, key_heads, depth]),
        ("value", [*sizes["key"][:3], sizes["value"][3]]),
    ):
        if any(None not in pair and pair[0] != pair[1] for pair in zip(sizes[name], wanted, strict=True)):
            raise ValueError(
                f"{name} must have shape {tf.TensorShape(wanted)}, as query and key have. "
                f"Received: {name}={_words(tensors[name])}, query={_words(query)}"
            )
    if heads > 0:
        pattern.check_heads(heads)
    if positions is not None:
        pattern.check_positions(positions)
    return query, key, value


def check_lengths(lengths, query):
    """Lengths as an int32 tensor `[batch]`; None stays.

    Numbers that int32 does not hold become its largest or smallest, so that the op refuses them too.
    """
    if lengths is None:
        return None
    given = None if tf.is_tensor(lengths) or isinstance(lengths, tf.Variable) else np.asarray(lengths)
    if given is not None and given.dtype.kind not in "iu":
        raise ValueError(f"lengths must be integers. Received: lengths={lengths!r}")
    lengths = tf.convert_to_tensor(lengths)
    batch = query.shape[0]
    if not lengths.dtype.is_integer:
        raise ValueError(f"lengths must be integers. Received: lengths={_words(lengths)}")
    if not lengths.shape.is_compatible_with([batch]):
        axes = "[batch]" if batch is None else f"[batch] = [{batch}]"
        raise ValueError(f"lengths must have shape {axes}. Received: lengths={_words(lengths)}")
    positions = query.shape[1]
    if given is not None and positions is not None:  # numbers of the host's: no device need be asked
        for index in np.flatnonzero((given < 0) | (given > positions))[:1]:
            raise ValueError(f"lengths must be from 0 to {positions}. Received: lengths[{index}]={given[index]}")
    return lengths if lengths.dtype == tf.int32 else tf.saturate_cast(lengths, tf.int32)


def check_sink(sink, query):
    """The sink as a tensor of floats `[head]`; None stays."""
    if sink is None:
        return None
    sink = tf.convert_to_tensor(sink)
    if not sink.dtype.is_floating or not sink.shape.is_compatible_with([query.shape[2]]):
        raise ValueError(f"sink must be floats of shape [{query.shape[2]}], one a head. Received: sink={_words(sink)}")
    return sink


def check_scale(scale, query):
    """The scale as a finite float: `1 / sqrt(key_dim)` where it is None."""
    if scale is None:
        depth = query.shape[3]
        if depth is None:
            raise ValueError(
                f"scale must be given where key_dim is not static. Received: scale=None, query={_words(query)}"
            )
        return 1.0 / math.sqrt(max(depth, 1))
    try:
        number = float(scale)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= np.finfo(np.float32).max:
        raise ValueError(f"scale must be a finite Python number. Received: scale={scale!r}")
    return number


def _words(tensor):
    return f"<{tensor.dtype.name} of shape {tensor.shape}>"
