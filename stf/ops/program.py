"""What the ops are told of a pattern."""

import functools

import numpy as np
import tensorflow as tf

from stf.patterns import Program, lower

FORMAT = 2  # of what the ops are told; custom_ops/tensorflow/attention/schema.cc says which there have been


class ProgramArguments:
    """A program as arguments of an op.

    The bits of its block layouts are a tensor, made once: a graph captures it once, however many ops it has.
    """

    def __init__(self, program):
        self._layouts = program.layouts
        self._layout_bits = None
        self._attributes = {
            "components": list(program.components),
            "program_begin": list(program.program_begin),
            "format": FORMAT,
        }

    def keywords(self):
        """The arguments by their names."""
        return {**self._attributes, "layout_bits": self._tensors()}

    def _tensors(self):
        if not self._layouts:
            return []
        with tf.init_scope():
            if self._layout_bits is not None and tf.executing_eagerly():
                return [self._layout_bits]
            bits = tf.constant(np.frombuffer(self._layouts, np.uint8))
            if tf.executing_eagerly():  # a graph that is no function's captures nothing, and has a constant of its own
                self._layout_bits = bits
            return [bits]


def program_arguments(pattern, num_heads, restart=False):
    """The keyword arguments by which the attention ops know a pattern; `restart` as `lower` has it."""
    return (
        _lowered(pattern, num_heads, restart).keywords()
        if num_heads
        else ProgramArguments(Program([], [0], b"")).keywords()
    )


COUNTS = {"lengths": "num_lengths", "layout_bits": "num_layouts", "documents": "num_documents"}


def arguments_of(op, first, optional=("lengths", "layout_bits")):
    """Of an attention op, for its gradient: the keyword arguments that do not depend on what is differentiated.

    Args:
        op: the op.
        first: the place of its first optional input.
        optional: the optional inputs, in their order, lists of one or none.
    """
    given = iter(op.inputs[first:])
    inputs = {name: [next(given) for _ in range(op.get_attr(COUNTS[name]))] for name in optional}
    attributes = {name: op.get_attr(name) for name in ("components", "program_begin", "scale", "format")}
    return inputs | attributes


@functools.lru_cache(maxsize=256)
def _lowered(pattern, num_heads, restart):
    return ProgramArguments(lower(pattern, num_heads, restart))
