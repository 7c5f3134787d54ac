"""From Keras' masks to what the op takes: the documents of a sequence, of which padding on its sides is none."""

import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from stf.ops.documents import document_bounds


class Masks(NamedTuple):
    """What masks come down to."""

    lengths: tf.Tensor | None = None  # [batch], the position behind the last in use
    documents: tf.Tensor | None = None  # [batch, position, 2], see `stf.ops.document_bounds`
    answered: tf.Tensor | None = None  # bool [batch, position]: the others' outputs are 0
    refused: tf.Tensor | None = None  # bool [batch]: sequences whose mask no pattern expresses

    def answer(self, heads):
        """`heads` `[batch, position, head, depth]`, and 0 at queries that a mask leaves out."""
        if self.answered is None:
            return heads
        return tf.where(self.answered[:, :, None, None], heads, tf.zeros([], heads.dtype))

    def nan_where_refused(self, x):
        """`x` `[batch, ...]`, and NaN in every sequence whose mask is refused; so are gradients through it.

        Where XLA compiles, which leaves assertions out, this is what tells.
        """
        if self.refused is None:
            return x
        factor = tf.where(self.refused, tf.constant(float("nan"), x.dtype), tf.ones([], x.dtype))
        return x * tf.reshape(factor, [-1, *[1] * (x.shape.rank - 1)])


def read_masks(
    batch,
    positions,
    query_mask=None,
    key_masks=(),
    attention_mask=None,
    segment_ids=None,
    document_starts=None,
):
    """`Masks` of what a layer was called with.

    Args:
        batch, positions: how many sequences, and positions of each.
        query_mask: bool `[batch, position]`: queries that are answered, or None for all.
        key_masks: masks like that of keys, or None each: positions that one of them leaves out are padding.
        attention_mask: bool or numbers that broadcast to `[batch, position, position]`, or None.
        segment_ids, document_starts: see `stf.ops.document_bounds`.

    Raises:
        ValueError: shapes that do not fit; names the mask.
        InvalidArgumentError: when it runs, for masks that cannot be expressed; names the mask. Under XLA see
            `Masks.nan_where_refused`.
    """
    wanted = [size if isinstance(size, int) else None for size in (batch, positions)]
    _check_shape("segment_ids", segment_ids, wanted)
    _check_shape("document_starts", document_starts, [wanted[0], None])
    _check_shape("query_mask", query_mask, wanted)
    for mask in key_masks:
        _check_shape("value_mask and key_mask", mask, wanted)
    key_masks = [mask for mask in key_masks if mask is not None]
    one_mask = any(mask is query_mask for mask in key_masks)  # of queries and keys
    lengths, bounds, refused = None, None, []
    if segment_ids is not None or document_starts is not None:
        bounds = document_bounds(segment_ids, document_starts, positions)
    if attention_mask is not None:
        _check_broadcast("attention_mask", attention_mask, [wanted[0], wanted[1], wanted[1]])
        bounds, wrong = _of_attention_mask(attention_mask, batch, positions, bounds)
        refused.append(
            _refuse(
                wrong,
                "`attention_mask` must leave each query, of the keys up to it, those of its own document: a causal "
                "mask, or causal blocks along the diagonal. For padding there is `query_mask` (`value_mask`, "
                "`key_mask`), for other sets `pattern`. Received: attention_mask=",
                attention_mask,
            )
        )
    if key_masks:
        used = functools.reduce(tf.logical_and, [tf.cast(mask, tf.bool) for mask in key_masks])
        runs = _runs(used, bounds)
        refused.append(
            _refuse(
                tf.reduce_any(used & (runs > 1), axis=1),
                "A mask's padding must be on the left and on the right alone. Received: mask=",
                used,
            )
        )
        if not one_mask or len(key_masks) > 1:
            asked = tf.ones_like(used) if query_mask is None else tf.cast(query_mask, tf.bool)
            refused.append(
                _refuse(
                    tf.reduce_any(asked & ~used & (runs > 0), axis=1),
                    "`query_mask` must leave out what is behind the last key of `value_mask` and `key_mask` (in each "
                    "document). Received: query_mask=",
                    asked,
                )
            )
        lengths = _behind_last(used)
        bounds = _cut(bounds, used)
    # Queries that no key's mask has are of no document: they need no second look.
    answered = None if query_mask is None or one_mask else tf.cast(query_mask, tf.bool)
    refused = tf.reduce_any(tf.stack(refused), 0) if refused else None
    return Masks(lengths, bounds, answered, refused)


def _check_shape(name, mask, wanted):
    """Refuses a mask whose static shape is another than `wanted`."""
    if mask is not None and not _shape(mask).is_compatible_with(wanted):
        raise ValueError(f"`{name}` must have shape {tf.TensorShape(wanted)}. Received: shape {_shape(mask)}")


def _check_broadcast(name, mask, wanted):
    """Refuses a mask that does not broadcast to `wanted`."""
    shape = _shape(mask)
    sizes = [] if shape.rank is None else [1] * (3 - shape.rank) + shape.as_list()
    if (
        len(sizes) > 3
        or shape.rank in (0, 1)
        or any(size not in (None, 1) and most not in (None, size) for size, most in zip(sizes, wanted, strict=False))
    ):
        raise ValueError(
            f"`{name}` must be [position, position] or [batch, position, position], here {tf.TensorShape(wanted)}. "
            f"Received: {name} of shape {shape}"
        )


def _shape(mask):
    return tf.TensorShape(mask.shape if hasattr(mask, "shape") else np.shape(mask))


def _refuse(wrong, words, mask):
    """`wrong`, bool `[batch]`, once it has been seen to hold nowhere; where XLA compiles nobody looks."""
    check = tf.debugging.Assert(~tf.reduce_any(wrong), [words, mask], summarize=16)
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(wrong)


def _behind_last(used):
    """The position behind the last in use, int32 `[batch]`; 0 where none is."""
    return tf.reduce_max(tf.where(used, tf.range(tf.shape(used)[1]) + 1, 0), axis=1)


def _cut(bounds, used):
    """Documents less the positions that are not in use, which are of none."""
    if bounds is None:
        return document_bounds(segment_ids=tf.where(used, 0, -1))
    # Neighbours of one document have one first position; those that had none keep their own.
    return document_bounds(segment_ids=tf.where(used & _of_some(bounds), bounds[:, :, 0], -1))


def _of_some(bounds):
    """Whether each position is of a document."""
    return bounds[:, :, 0] <= tf.range(tf.shape(bounds)[1])


def _runs(used, bounds):
    """How many runs of positions in use have begun in each position's document up to it, floats `[batch, position]`."""
    place = tf.range(tf.shape(used)[1])
    first = tf.zeros_like(place)[None] if bounds is None else bounds[:, :, 0]
    first = tf.broadcast_to(first, tf.shape(used))
    earlier = tf.concat([tf.zeros_like(used[:, :1]), used[:, :-1]], axis=1)
    begins = used & (~earlier | tf.equal(place, first))
    count = tf.cumsum(tf.cast(begins, tf.float64), axis=1)  # floats, as in `stf.ops.documents`
    before = tf.concat([tf.zeros_like(count[:, :1]), count], axis=1)
    return count - tf.gather(before, first, axis=1, batch_dims=1)


def _of_attention_mask(mask, batch, positions, bounds):
    """The documents of a mask by query and key, within those of `bounds`, and of which sequences it has no such."""
    mask = tf.cast(mask, tf.bool)
    mask = mask[None] if mask.shape.rank == 2 else mask
    place = tf.range(positions)
    mask = tf.broadcast_to(mask, tf.stack([tf.shape(mask)[0], positions, positions]))
    mask = mask & (place <= place[:, None])  # every pattern is causal
    if bounds is not None:
        mask = mask & ((place >= bounds[:, :, :1]) & (place[:, None] < bounds[:, None, :, 1]))
    some = tf.linalg.diag_part(mask)
    first = tf.argmax(tf.cast(mask, tf.float32), axis=2, output_type=tf.int32)
    bounds = document_bounds(segment_ids=tf.where(some, first, -1))
    found = (place >= bounds[:, :, :1]) & (place <= place[:, None])
    wrong = tf.reduce_any(tf.not_equal(mask, found), axis=[1, 2])
    # A mask may be one for all sequences.
    return tf.broadcast_to(bounds, tf.stack([batch, positions, 2])), tf.broadcast_to(wrong, [batch])
