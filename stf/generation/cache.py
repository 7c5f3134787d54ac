"""The keys and values that a pattern's later queries still read, as tensors that a loop in a graph carries."""

import itertools
import math

import numpy as np
import tensorflow as tf

from stf.generation.slots import slots_of
from stf.layers.validation import key_value_heads, positive
from stf.patterns.lowering import programs
from stf.patterns.pattern import Pattern
from stf.typing import TensorLike


class KeyValueCache:
    """Caches of an attention layer that is run one position at a time, or of several that have one pattern.

    The state is a list of tensors, so that it can go through `tf.while_loop`, under XLA too. Each of a pattern's
    components (see `stf.patterns`) has as much room as its later queries still read:

    | component | positions kept of n | read by a step |
    |---|---|---|
    | causal | n | n |
    | local, window w | w + 1, a ring | w + 1 |
    | strided l | n, each residue's by itself | n / l |
    | own block l | l, a ring | l |
    | summary, c columns of l | c n / l | c n / l |
    | block layout | the most that rows still ask for at a time | the most blocks of a row |

    Examples:
        >>> cache = stf.generation.KeyValueCache(stf.patterns.Local(2), num_heads=1, length=8, key_dim=4, value_dim=4)
        >>> state = cache.zeros(batch_size=1)
        >>> query = key = value = tf.ones([1, 1, 4])
        >>> for position in range(8):
        ...     state = cache.write(state, key, value, position)
        ...     output = cache.attend(state, query, position)

    Args:
        pattern: a `stf.patterns.Pattern`.
        num_heads: heads of the attention.
        length: positions to make room for.
        key_dim: depth of a head's query and key.
        value_dim: depth of a head's value.
        layers: how many layers' caches lie side by side in the state; `layer` of the methods says which is meant, an
            int or a scalar tensor.
        num_key_value_heads: heads of key and value, which divide `num_heads`, where heads share them; as many as heads
            unless given. Each is kept once for each of the pattern's programs whose heads read it.

    Raises:
        ValueError: an argument that does not fit; names it.
    """

    def __init__(
        self,
        pattern: Pattern,
        num_heads: int,
        length: int,
        key_dim: int,
        value_dim: int,
        layers: int = 1,
        num_key_value_heads: int | None = None,
    ) -> None:
        self.num_heads = positive("num_heads", num_heads)
        self.length = positive("length", length)
        self.key_dim, self.value_dim = positive("key_dim", key_dim), positive("value_dim", value_dim)
        self.layers = positive("layers", layers)
        self.num_key_value_heads = key_value_heads(num_key_value_heads, self.num_heads)
        self._programs = [
            [slots_of(part, of_head, self.length) for part in of_head] for of_head in programs(pattern, self.num_heads)
        ]
        shared, period = self.num_heads // self.num_key_value_heads, len(self._programs)
        read = [[head // shared for head in range(program, self.num_heads, period)] for program in range(period)]
        # Of each program the key heads that are kept, and where among them each of its heads finds the one it reads.
        self._kept = [sorted(set(of_program)) for of_program in read]
        self._place = [
            [kept.index(head) for head in of_program] for of_program, kept in zip(read, self._kept, strict=True)
        ]

    @property
    def slots(self) -> list[int]:
        """Positions that are kept of each head, of one layer: a list of ints."""
        return self._of_heads(lambda part: part.slots)

    @property
    def slots_read(self) -> list[int]:
        """Positions that a step reads of each head, of one layer: a list of ints."""
        return self._of_heads(_reads)

    @property
    def part_reads(self) -> list[list[int]]:
        """For each program, how many slots a step reads of each of its parts: lists of ints."""
        return [[_reads(part) for part in parts] for parts in self._programs]

    def reads(self, position: int | tf.Tensor) -> tf.Tensor:
        """For all parts, one behind another, the slots that the query at `position` attends to; -1: none. int32."""
        parts = itertools.chain(*self._programs)
        return tf.concat([tf.where(part.seen(position), part.read_slots(position), -1) for part in parts], 0)

    def writes(self, position: int | tf.Tensor) -> tf.Tensor:
        """The slot of each part that a position's key and value go to; -1: none. int32 `[part]`."""
        parts = itertools.chain(*self._programs)
        return tf.stack([tf.where(part.keeps(position), part.slot(position), -1) for part in parts])

    def _of_heads(self, count):
        of_program = [sum(map(count, parts)) for parts in self._programs]
        return [of_program[head % len(of_program)] for head in range(self.num_heads)]

    def bytes(self, batch_size: int, dtype: str = "float32") -> int:
        """Bytes of a state."""
        shapes = self.shapes(batch_size)
        return sum(map(math.prod, shapes)) * tf.as_dtype(dtype).size

    def zeros(self, batch_size: int, dtype: str = "float32") -> list[tf.Tensor]:
        """A state in which nothing was written: a list of tensors `[layers * slot, batch, head, depth]`."""
        return [tf.zeros(shape, dtype) for shape in self.shapes(batch_size)]

    def shapes(self, batch_size: int) -> list[tuple[int, int, int, int]]:
        """Shapes of a state's tensors."""
        shapes = []
        for program, parts in enumerate(self._programs):
            heads = len(self._kept[program])
            for part in parts:
                shapes += [
                    (self.layers * part.slots, batch_size, heads, depth) for depth in (self.key_dim, self.value_dim)
                ]
        return shapes

    def write(
        self,
        state: list[tf.Tensor],
        key: tf.Tensor,
        value: tf.Tensor,
        position: int | tf.Tensor,
        layer: int | tf.Tensor = 0,
    ) -> list[tf.Tensor]:
        """The state with a position's key and value.

        Args:
            state: of this cache.
            key: `[batch, key_head, key_dim]`.
            value: `[batch, key_head, value_dim]`.
            position: int or int32 scalar; the positions before it have been written.
            layer: see the class.

        Returns:
            The new state.
        """
        written = []
        for program, part, keys, values in self._parts(state):
            slot = layer * part.slots + part.slot(position)
            for tensor, new in ((keys, key), (values, value)):
                new = tf.cast(_take_heads(new, self._kept[program], 1), tensor.dtype)
                if part.leaves_out:
                    new = tf.where(part.keeps(position), new, tf.gather(tensor, slot))
                written.append(tf.tensor_scatter_nd_update(tensor, [[slot]], new[None]))
        return written

    def fill(self, key: tf.Tensor, value: tf.Tensor, count: int | tf.Tensor) -> list[tf.Tensor]:
        """A state, of one layer, of the first `count` positions at once.

        Args:
            key: `[batch, position, key_head, key_dim]`, of `count` positions or more: what is behind them is not looked
                at.
            value: `[batch, position, key_head, value_dim]`, the same.
            count: int or int32 scalar.

        Returns:
            The state, in the dtype of `key` and `value`.
        """
        state = []
        for program, parts in enumerate(self._programs):
            kept = [_take_heads(tensor, self._kept[program], 2) for tensor in (key, value)]
            for part in parts:
                positions = tf.clip_by_value(part.filled(count), 0, tf.shape(key)[1] - 1)
                for tensor in kept:
                    state.append(tf.transpose(tf.gather(tensor, positions, axis=1), [1, 0, 2, 3]))
        return state

    def attend(
        self,
        state: list[tf.Tensor],
        query: tf.Tensor,
        position: int | tf.Tensor,
        scale: float | None = None,
        layer: int | tf.Tensor = 0,
        sink: TensorLike | None = None,
    ) -> tf.Tensor:
        """Attention of the query at `position`, whose own key and value have been written.

        Scores, softmax and sums are in float32 (Section 5.6; float64 where the query is).

        Args:
            state: of this cache.
            query: `[batch, head, key_dim]`.
            position: int or int32 scalar.
            scale: factor of the scores, `1 / sqrt(key_dim)` unless given.
            layer: see the class.
            sink: `[head]`, as `stf.ops.attention` takes it, or None.

        Returns:
            `[batch, head, value_dim]`, in the query's dtype; 0 where the query attends to nothing.
        """
        exact = tf.float64 if query.dtype == tf.float64 else tf.float32
        scaled = tf.cast(query, exact) * tf.cast(self.key_dim**-0.5 if scale is None else scale, exact)
        outputs = []
        for program in range(len(self._programs)):
            heads, scores, values = slice(program, None, len(self._programs)), [], []
            for _, part, key, value in self._parts(state, program):
                keys, read = (
                    _take_heads(tf.cast(part.read(tensor, position, layer), exact), self._place[program], 2)
                    for tensor in (key, value)
                )
                seen = part.seen(position)[:, None, None]
                score = tf.reduce_sum(scaled[:, heads] * keys, -1)  # [slot, batch, head]
                scores.append(tf.where(seen, score, tf.constant(-np.inf, exact)))
                values.append(read)
            outputs.append(_weighted(scores, values, None if sink is None else tf.cast(sink, exact)[heads]))
        return tf.cast(_interleaved(outputs, self.num_heads), query.dtype)

    def _parts(self, state, program=None):
        """Each component's program, slots, keys and values; of one program or of all."""
        tensors = iter(state)
        for number, parts in enumerate(self._programs):
            for part in parts:
                key, value = next(tensors), next(tensors)
                if program in (None, number):
                    yield number, part, key, value


def _take_heads(tensor, heads, axis):
    """Some heads of a tensor: a slice where they are evenly apart, as all are whose keys no others share."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if step > 0 and heads == list(range(heads[0], heads[-1] + 1, step)):
        return tensor[(slice(None),) * axis + (slice(heads[0], heads[-1] + 1, step),)]
    return tf.gather(tensor, heads, axis=axis)


def _reads(part):
    """How many slots a step reads of a part."""
    return part.held(0).shape[0]


def _weighted(scores, values, sink):
    """The softmax of all parts' scores and of the sink `[head]`, applied to values: `[batch, head, value_dim]`."""
    largest = tf.reduce_max(tf.stack([tf.reduce_max(score, 0) for score in scores]), 0)
    largest = largest if sink is None else tf.maximum(largest, sink)
    largest = tf.where(tf.math.is_finite(largest), largest, 0.0)
    total, output = 0.0 if sink is None else tf.exp(sink - largest), 0.0
    for score, value in zip(scores, values, strict=True):
        weight = tf.exp(score - largest)
        total += tf.reduce_sum(weight, 0)
        # Where nothing was written there may be anything, which 0 does not make 0.
        output += tf.reduce_sum(tf.where(weight[..., None] > 0, weight[..., None] * value, 0.0), 0)
    return tf.math.divide_no_nan(output, total[..., None])


def _interleaved(outputs, num_heads):
    """The heads of all programs `[batch, head, depth]` in their order: head h is one of program `h mod programs`."""
    period = len(outputs)
    return tf.stack([outputs[head % period][:, head // period] for head in range(num_heads)], 1)
