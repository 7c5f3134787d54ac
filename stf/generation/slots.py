"""Which positions a component's cache keeps, where, and which of them a step reads."""

import numpy as np
import tensorflow as tf

from stf.patterns.component import Kind, covers


def slots_of(component, head, length):
    """The slots of one of a head's components, for sequences of `length` positions.

    Args:
        component: one of `head`.
        head: all components of the head, of which the component may leave some out.
        length: of the sequences.
    """
    kinds = {Kind.STRIDED: Residues, Kind.SUMMARY: Columns, Kind.BLOCKS: LiveBlocks}
    return kinds.get(component.kind, Ring)(component, head, length)


class Slots:
    """Room for the positions of a component that later queries still read.

    Attributes:
        slots: positions that are kept.
        leaves_out: whether some positions are never kept.
    """

    leaves_out = False

    def __init__(self, component, head, length):
        self.component, self.length = component, length
        self._left_out = [other for t, other in enumerate(head) if component.exclude >> t & 1]
        self.slots = self._count()

    def _count(self):
        """How many slots there are; makes the tables that the other methods read."""
        raise NotImplementedError

    def slot(self, position):
        """Where a position is kept."""
        raise NotImplementedError

    def keeps(self, position):
        """Whether a position is kept at all."""
        return True

    def filled(self, count):
        """The position in each slot when the first `count` have been written, int32 `[slots]`.

        A number outside 0 ... count - 1 says that the slot is empty.
        """
        raise NotImplementedError

    def read(self, tensor, position, layer):
        """The slots `[read, batch, head, depth]` that the query at `position` reads, of a layer's."""
        return _part(tensor, self.slots, layer)

    def read_slots(self, position):
        """Which slots those are, int32 `[read]`."""
        return tf.range(self.slots)

    def held(self, position):
        """The positions in those slots, int32 `[read]`."""
        return self.filled(position + 1)

    def seen(self, position):
        """Which of those slots the query at `position` attends to, bool `[read]`."""
        held = self.held(position)
        seen = (held >= 0) & (held <= position) & _covers(self.component, position, held)
        for other in self._left_out:
            seen &= ~_covers(other, position, held)
        return seen


class Ring(Slots):
    """The last positions, each in the slot of its number modulo the slots: causal, local and own block."""

    def _count(self):
        most = {Kind.LOCAL: self.component.a + 1, Kind.OWN_BLOCK: self.component.a}
        return min(most.get(self.component.kind, self.length), self.length)

    def slot(self, position):
        return position % self.slots

    def filled(self, count):
        last = count - 1
        return last - (last - tf.range(self.slots)) % self.slots


class Residues(Slots):
    """All positions, those of one residue modulo the stride side by side: a query reads its own residue's."""

    def _count(self):
        self._stride = min(self.component.a, self.length)
        self._rows = -(-self.length // self._stride)
        return self._stride * self._rows

    def slot(self, position):
        return position % self._stride * self._rows + position // self._stride

    def filled(self, count):
        slots = tf.range(self.slots)
        return slots // self._rows + self._stride * (slots % self._rows)

    def read(self, tensor, position, layer):
        return _part(tensor, self._rows, layer * self._stride + position % self._stride)

    def read_slots(self, position):
        return position % self._stride * self._rows + tf.range(self._rows)

    def held(self, position):
        return position % self._stride + self._stride * tf.range(self._rows)


class Columns(Slots):
    """The columns of a summary, of every block."""

    leaves_out = True

    def _count(self):
        # Columns behind the last position are none, so that none of the numbers is larger than the length.
        self._stride, self._first, end = (
            min(x, self.length) for x in (self.component.a, self.component.b, self.component.c)
        )
        self._width = max(end - self._first, 1)
        return -(-self.length // self._stride) * self._width

    def slot(self, position):
        column = tf.clip_by_value(position % self._stride - self._first, 0, self._width - 1)
        return position // self._stride * self._width + column

    def keeps(self, position):
        column = position % self._stride - self._first
        return (column >= 0) & (column < self._width)

    def filled(self, count):
        slots = tf.range(self.slots)
        return slots // self._width * self._stride + self._first + slots % self._width


class LiveBlocks(Slots):
    """The blocks of a layout that a row at or behind the newest still asks for, each in a place that is free."""

    leaves_out = True

    def _count(self):
        c = self.component
        blocks = -(-self.length // c.a)
        layout = np.tril(c.layout)[:blocks, :blocks]
        asked = layout.any(0)
        until = np.where(asked, blocks - 1 - np.argmax(layout[::-1], axis=0), -1)  # the last row that asks for a column
        place, free, ends = np.full(blocks, -1, np.int32), [], {}
        count = 0
        for row in range(blocks):
            free += ends.pop(row - 1, [])  # places whose last row has gone by
            if until[row] < 0:
                continue
            if not free:
                free.append(count)
                count += 1
            place[row] = free.pop()
            ends.setdefault(int(until[row]), []).append(int(place[row]))
        self._blocks, self._place, self._places = blocks, place, max(count, 1)
        most = max(1, int(layout.sum(1).max()))
        self._of_row = np.full((blocks, most), -1, np.int32)  # the columns of each row
        for row in range(blocks):
            columns = np.flatnonzero(layout[row])
            self._of_row[row, : len(columns)] = columns
        return self._places * c.a

    def slot(self, position):
        size = self.component.a
        return tf.maximum(tf.gather(self._place, position // size), 0) * size + position % size

    def keeps(self, position):
        return tf.gather(self._place, position // self.component.a) >= 0

    def filled(self, count):
        size = self.component.a
        columns = np.arange(self._blocks)
        here = (self._place[:, None] == np.arange(self._places)) & (columns[:, None] * size < count)
        newest = tf.reduce_max(tf.where(here, columns[:, None].astype(np.int32), -1), 0)  # [place]
        return tf.reshape(newest[:, None] * size + tf.range(size), [-1])

    def read(self, tensor, position, layer):
        return tf.gather(tensor, layer * self.slots + self.read_slots(position))

    def read_slots(self, position):
        size = self.component.a
        columns = tf.gather(self._of_row, position // size)
        places = tf.maximum(tf.gather(self._place, tf.maximum(columns, 0)), 0)
        return tf.reshape(places[:, None] * size + tf.range(size), [-1])

    def held(self, position):
        size = self.component.a
        columns = tf.gather(self._of_row, position // size)
        positions = tf.where(columns[:, None] < 0, -1, columns[:, None] * size + tf.range(size))
        return tf.reshape(positions, [-1])


def _part(tensor, count, index):
    """Rows `index * count` to before `(index + 1) * count` of a tensor.

    By a gather of one: XLA would compile a slice anew for each place that it is given from outside.
    """
    if tensor.shape[0] == count:
        return tensor
    return tf.gather(tf.reshape(tensor, [-1, count, *_sizes(tensor)[1:]]), index)


def _sizes(tensor):
    """Sizes of a tensor's axes, ints where they are known."""
    return [tf.shape(tensor)[axis] if size is None else size for axis, size in enumerate(tensor.shape)]


def _covers(component, i, j):
    """`covers` for tensors, of the query i and keys j `[keys]`; what is said of keys behind the query is not used."""
    if component.kind != Kind.BLOCKS:
        return covers(component, i, j)
    row = tf.gather(component.layout, i // component.a)
    return tf.gather(row, tf.clip_by_value(j // component.a, 0, component.c - 1))
