"""Documents packed into one sequence: each position attends within its own."""

import numpy as np
import tensorflow as tf

from stf.patterns.validation import integer
from stf.typing import TensorLike


def document_bounds(
    segment_ids: TensorLike | None = None,
    document_starts: TensorLike | None = None,
    positions: int | tf.Tensor | None = None,
) -> tf.Tensor:
    """Where the documents of packed sequences begin and end, as `attention` takes them for many calls.

    One of the first two arguments says where the documents are.

    Examples:
        >>> stf.ops.document_bounds(tf.constant([[7, 7, 7, 2, 2, -1]])).numpy()[0].T
        array([[0, 0, 0, 3, 3, 6],
               [3, 3, 3, 5, 5, 5]], dtype=int32)

    Args:
        segment_ids: integers `[batch, position]`: neighbours with the same number are of one document; negative
            numbers are of none: such a position attends to nothing and nothing attends to it; what is there must be
            finite all the same (`lengths` are for what may be anything).
        document_starts: integers `[batch, document]`: positions at which documents begin, in any order. Others than
            0 to the number of positions less one say nothing: rows of fewer documents are filled with -1. What is
            before the first is a document, too.
        positions: the number of positions, an int or an integer scalar; needed with `document_starts`.

    Returns:
        int32 `[batch, position, 2]`: of each position the first of its document, and the one behind its last.

    Raises:
        ValueError: not one of the two, numbers that are no integers, or other shapes.
    """
    if (segment_ids is None) == (document_starts is None):
        raise ValueError(
            "One of segment_ids and document_starts must be given. "
            f"Received: segment_ids={segment_ids}, document_starts={document_starts}"
        )
    positions = None if positions is None else _count(positions)
    if segment_ids is not None:
        ids = _integers("segment_ids", segment_ids, "[batch, position]")
        if isinstance(positions, int) and ids.shape[1] not in (None, positions):
            raise ValueError(f"positions must be that of segment_ids, {ids.shape[1]}. Received: positions={positions}")
        begins = tf.not_equal(ids, tf.concat([ids[:, :1], ids[:, :-1]], axis=1))
        return _bounds(begins, ids >= 0)
    starts = _integers("document_starts", document_starts, "[batch, document]")
    if positions is None:
        raise ValueError("positions must be given with document_starts. Received: positions=None")
    return _bounds(_marked(starts, positions), None)


def check_bounds(bounds, query):
    """`document_bounds` of other shapes than the query has are refused."""
    bounds = tf.convert_to_tensor(bounds)
    wanted = [*query.shape[:2], 2]
    if bounds.dtype != tf.int32 or not bounds.shape.is_compatible_with(wanted):
        raise ValueError(
            f"documents must be what stf.ops.document_bounds gives, int32 of shape {tf.TensorShape(wanted)}. "
            f"Received: documents=<{bounds.dtype.name} of shape {bounds.shape}>"
        )
    return bounds


def in_documents(allowed, bounds, restart):
    """The pairs of a pattern's mask that are of one document.

    Args:
        allowed: bool `[1 or batch, head, position, position]`, by query and key.
        bounds: what `document_bounds` gives, or None: nothing is left out.
        restart: whether the mask is counted from each document's first position on.

    Returns:
        bool `[batch, head, position, position]`.
    """
    if bounds is None:
        return allowed
    first, end = bounds[:, :, 0], bounds[:, :, 1]
    positions = tf.range(tf.shape(first)[1])
    if restart:
        within = tf.maximum(positions - first, 0)  # each query's place in its document
        keys = tf.maximum(positions[None, None] - first[:, :, None], 0)  # [batch, query, key]
        rows = tf.gather(
            tf.repeat(allowed, tf.shape(first)[0] // tf.shape(allowed)[0], axis=0), within, axis=2, batch_dims=1
        )
        allowed = tf.gather(rows, tf.repeat(keys[:, None], tf.shape(rows)[1], axis=1), axis=3, batch_dims=3)
        allowed = allowed & (positions <= positions[:, None])
    return allowed & ((positions >= first[:, :, None]) & (positions[:, None] < end[:, None]))[:, None]


def _count(positions):
    """A number of positions: an int, or an integer scalar."""
    if tf.is_tensor(positions):
        if not positions.dtype.is_integer or positions.shape.rank not in (None, 0):
            raise ValueError(f"positions must be an integer scalar. Received: positions={positions}")
        return positions
    return integer("positions", positions, 0)


def _integers(name, values, axes):
    given = None if tf.is_tensor(values) or isinstance(values, tf.Variable) else np.asarray(values)
    if given is not None and given.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers. Received: {name}={values!r}")
    values = tf.convert_to_tensor(values)
    if not values.dtype.is_integer or values.shape.rank not in (None, 2):
        raise ValueError(
            f"{name} must be integers {axes}. Received: {name}=<{values.dtype.name} of shape {values.shape}>"
        )
    return tf.cast(values, tf.int64)  # which GPUs compute with, where TensorFlow leaves int32 to the host


def _marked(starts, positions):
    """Whether each position is one of `starts`, bool `[batch, position]`."""
    batch, positions = tf.shape(starts, tf.int64)[0], tf.cast(positions, tf.int64)
    columns = tf.where((starts >= 0) & (starts < positions), starts, positions)
    rows = tf.repeat(tf.range(batch)[:, None], tf.shape(starts)[1], axis=1)
    places = tf.stack([rows, columns], axis=-1)
    count = tf.scatter_nd(places, tf.ones_like(columns, tf.float32), tf.stack([batch, positions + 1]))
    return count[:, :-1] > 0


def _bounds(begins, used):
    """`document_bounds` of the positions at which something begins, and of those that are of a document at all."""
    # Floats, which GPUs compute with, of 64 bits, which hold every position.
    count = tf.cast(tf.shape(begins, tf.int64)[1], tf.float64)
    position = tf.range(count)
    zero = tf.zeros([], tf.float64)
    first = _running_maximum(tf.where(begins, position, zero))
    # The end, counted from behind: the next position that begins something.
    next_begins = tf.concat([begins[:, 1:], tf.ones_like(begins[:, :1])], axis=1)
    from_behind = tf.where(next_begins, count - 1 - position, zero)
    end = count - tf.reverse(_running_maximum(tf.reverse(from_behind, [1])), [1])
    if used is not None:
        first, end = tf.where(used, first, position + 1), tf.where(used, end, position)
    return tf.cast(tf.stack([first, end], axis=-1), tf.int32)


def _running_maximum(x):
    """The largest so far of `x`, floats `[batch, position]`, 0 or more: by doubling, which every device does fast."""
    if x.shape[1] is not None:
        shift = 1
        while shift < x.shape[1]:
            x = tf.maximum(x, tf.pad(x[:, :-shift], [[0, 0], [shift, 0]]))
            shift *= 2
        return x
    place = tf.range(tf.shape(x)[1])

    def double(shift, x):  # by a gather: XLA compiles no padding of a size that the loop says
        behind = tf.gather(x, tf.maximum(place - shift, 0), axis=1)
        return 2 * shift, tf.ensure_shape(tf.maximum(x, behind), [None, None])

    return tf.while_loop(lambda shift, _: shift < tf.shape(x)[1], double, [tf.constant(1), x])[1]
