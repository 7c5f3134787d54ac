"""The blocks of a stack on several devices, each of which has some of the positions; and their gradient.

Everything of a block but its attention is by position, so a device runs whole blocks on what it has: with a halo, or on
positions dealt out so that a query's keys lie beside it (`stf.patterns.partition`). Only where attention reads all over
the sequence a block is run in three steps, with queries, keys and values exchanged before the second and its outputs
behind it.

One program holds all devices' operations, and what crosses from one to another is copied by TensorFlow, beside whatever
the devices compute. Sums over devices are made in their order: the same bits every run.
"""

import tensorflow as tf

from stf import ops
from stf.distribution.exchanges import (
    ColumnsExchange,
    HaloExchange,
    HeadsExchange,
    from_remainders,
    on_each,
    to_remainders,
)
from stf.layers.block import Block, BlockWeights
from stf.layers.dropout import Part
from stf.layers.residual_loop import ResidualLoop, vjp
from stf.ops.differentiation import differentiable_once
from stf.ops.residual_stack import ResidualStack, op_weights
from stf.patterns.partition import Columns, Halo, Remainders, partition

SEGMENT = 2  # blocks that are computed again at a time, as the GPU's op does


class ParallelBlocks:
    """Runs the blocks of a stack on several devices.

    Args:
        stack: a built `stf.layers.SparseResidualStack`.
        devices: names of the devices, one after another along the sequence.
        positions: of a sequence, without padding.
        chunk: positions of each device; all together `positions` or more.
        seed: int32 `[2]` of dropout, or None for none.
    """

    def __init__(self, stack, devices, positions, chunk, seed):
        self._stack = stack
        self._devices = devices
        self._positions = positions
        self._chunk = chunk
        self._seed = seed
        distinct = {stack.pattern(index) for index in range(stack.num_blocks)}
        self._partitions = {
            pattern: partition(pattern, stack.num_heads, positions, chunk, len(devices)) for pattern in distinct
        }

    def __call__(self, streams, weights, training):
        """What the blocks make of `[batch, chunk, width]` of each device, differentiable once.

        Args:
            streams: of each device its positions, in the sequence's order.
            weights: of each device the `BlockWeights` of all blocks.
            training: whether a gradient will be asked for.

        Returns:
            Tensors like `streams`.
        """
        count = len(streams)

        def apart(tensors):
            size = len(BlockWeights._fields)
            return tensors[:count], [tensors[at : at + size] for at in range(count, len(tensors), size)]

        def forward(*inputs):
            streams, kept = self._forward(*apart(inputs), training)
            return tuple(streams), kept

        def backward(kept, *tensors):
            grads, of_weights = self._backward(kept, list(tensors[:count]), apart(tensors[count:])[1])
            return *grads, *(grad for of_device in of_weights for grad in of_device)

        inputs = [*streams, *(w for of_device in weights for w in of_device)]
        return list(differentiable_once(forward, backward)(*inputs)) if training else list(forward(*inputs)[0])

    def _segments(self):
        """The blocks that are computed again together."""
        size = SEGMENT if self._stack.recompute is True else 1
        blocks = range(self._stack.num_blocks)
        return [blocks[at : at + size] for at in range(0, len(blocks), size)]

    def _forward(self, streams, weights, training):
        recompute = self._stack.recompute
        kept, modulus = [], 0
        for segment in self._segments():
            streams, modulus = self._lay(streams, modulus, segment[0])
            if training and recompute is True:
                kept.append(streams)
            for index in segment:
                streams, modulus = self._lay(streams, modulus, index)
                runner = self._runner(index, streams, recompute)
                streams, of_block = runner.forward(streams, _of_block(weights, index, self._devices))
                if training and recompute is not True:
                    kept.append(of_block)
        return self._lay(streams, modulus, None)[0], kept

    def _backward(self, kept, grads, weights):
        recompute = self._stack.recompute
        of_blocks = [None] * self._stack.num_blocks
        modulus = 0
        for segment, of_segment in zip(reversed(self._segments()), reversed(kept), strict=True):
            first, last = segment[0], segment[-1]
            behind = grads
            grads, modulus = self._lay(grads, modulus, last)
            runners, own = {}, {first: of_segment}
            if recompute is True:
                streams = on_each(self._devices, _after, of_segment, behind)
                laid = self._modulus(first)
                for index in segment:
                    streams, laid = self._lay(streams, laid, index)
                    runners[index] = self._runner(index, streams, False if index < last else True)
                    if index < last:
                        w = _of_block(weights, index, self._devices)
                        streams, own[index] = runners[index].forward(streams, w)
                    else:
                        own[index] = runners[index].keep_inputs(streams)
            for index in reversed(segment):
                grads, modulus = self._lay(grads, modulus, index)
                runner = runners.get(index) or self._runner(index, grads, recompute)
                w = _of_block(weights, index, self._devices)
                grads, of_blocks[index] = runner.backward(own.pop(index), grads, w)
        grads, _ = self._lay(grads, modulus, None)
        stacked = on_each(
            self._devices,
            lambda s: [tf.concat(parts, 0) for parts in zip(*(of_block[s] for of_block in of_blocks), strict=True)],
            range(len(self._devices)),
        )
        return grads, stacked

    def _partition(self, index):
        return self._partitions[self._stack.pattern(index)]

    def _modulus(self, index):
        """Of what the positions of a block are dealt out by the remainders; 0 where they follow one another."""
        found = None if index is None else self._partition(index)
        return found.modulus if isinstance(found, Remainders) else 0

    def _lay(self, streams, modulus, index):
        """Streams as a block takes them (None: in the sequence's order), and the modulus of that."""
        wanted = self._modulus(index)
        if modulus and modulus != wanted:
            streams = from_remainders(streams, self._devices, modulus)
        if wanted and modulus != wanted:
            streams = to_remainders(streams, self._devices, wanted)
        return streams, wanted

    def _runner(self, index, streams, recompute):
        found = self._partition(index)
        seed = None if self._seed is None else self._seed + tf.constant([index, 0])
        n, m, count = self._positions, self._chunk, len(self._devices)
        stack = self._stack
        if isinstance(found, Remainders):
            run = found.modulus // count
            parts = [Part(n, s * run, run, found.modulus) for s in range(count)]
            return _WholeBlocks(stack, self._devices, found.patterns, parts, seed, recompute, streams, 0)
        if isinstance(found, Halo):
            size = m + found.positions
            parts = [Part(n, max(0, s * m - found.positions), size, 0) for s in range(count)]
            return _WholeBlocks(stack, self._devices, found.patterns, parts, seed, recompute, streams, found.positions)
        if isinstance(found, Columns):
            exchange = ColumnsExchange(self._devices, found, stack.num_heads, stack.key_dim, stack.value_dim, m)
            heads = [stack.num_heads] * count
        else:
            exchange = HeadsExchange(self._devices, found, stack.key_dim, stack.value_dim, n, m)
            heads = found.heads
        parts = [Part(n, s * m, m, 0) for s in range(count)]
        return _DividedBlocks(stack, self._devices, found.patterns, parts, seed, recompute, exchange, heads)


class _WholeBlocks:
    """One block as each device runs it by itself, on its positions and their halo.

    Args:
        stack: the layer.
        devices: the devices.
        patterns: of each device.
        parts: of each device, which positions it runs.
        seed: of the block's dropout, or None.
        recompute: what `backward` computes again.
        streams: what the block takes, for its dtype.
        halo: positions of the halo.
    """

    def __init__(self, stack, devices, patterns, parts, seed, recompute, streams, halo):
        self._devices = devices
        self._halo = HaloExchange(devices, halo)

        def runner(pattern, part, stream):
            if stack.runs_as_one_op(stream):
                return _OneOp(stack, pattern, part, seed, recompute)
            return _Loop(stack, pattern, part, seed, recompute)

        self._runners = on_each(devices, runner, patterns, parts, streams)

    def forward(self, streams, weights):
        """The block's outputs, and what `backward` takes of it."""
        found = self._each(lambda run, *given: run.forward(*given), self._halo.put(streams), weights)
        return self._halo.cut([output for output, _ in found]), [kept for _, kept in found]

    def keep_inputs(self, streams):
        """What `forward` would have `backward` take, where that is the inputs alone."""
        return self._each(lambda run, x: run.keep_input(x), self._halo.put(streams))

    def backward(self, kept, grads, weights):
        """Gradients of the inputs; and those of each device's weights."""
        grads = self._halo.cut_gradient(grads)
        found = self._each(lambda run, *given: run.backward(*given), kept, grads, weights)
        return self._halo.put_gradient([grad for grad, _ in found]), [of_weights for _, of_weights in found]

    def _each(self, function, *lists):
        return on_each(self._devices, function, self._runners, *lists)


class _OneOp:
    """A block of one device as the GPU's op."""

    def __init__(self, stack, pattern, part, seed, recompute):
        self._op = ResidualStack(
            seed, [pattern], stack.num_heads, stack.key_dim, stack.dropout, stack.epsilon, recompute, part
        )

    def forward(self, stream, weights):
        return self._op.forward(stream, op_weights(weights, stream.dtype))

    def keep_input(self, stream):
        return [tf.reshape(stream, [1, -1]), tf.zeros([1, 0])]

    def backward(self, kept, grad, weights):
        grad, *of_weights = self._op.backward(kept, grad, op_weights(weights, grad.dtype))
        return grad, [tf.cast(of_weight, w.dtype) for of_weight, w in zip(of_weights, weights, strict=True)]


class _Loop:
    """A block of one device in TensorFlow's operations; compiled for a GPU."""

    def __init__(self, stack, pattern, part, seed, recompute):
        self._stack, self._pattern, self._part, self._seed = stack, pattern, part, seed
        self._recompute = recompute

    def _run(self, weights, seed):
        def make(_, w):
            return _block(self._stack, w, self._pattern, self._part)

        return ResidualLoop(make, BlockWeights(*weights), 1, self._recompute, seed)

    def forward(self, stream, weights):
        def run(stream, weights, seed):
            return self._run(weights, seed).forward(stream, BlockWeights(*weights))

        return compiled(run)(stream, weights, self._seed)

    def keep_input(self, stream):
        return [], [(stream,)]

    def backward(self, kept, grad, weights):
        def run(kept, grad, weights, seed):
            return self._run(weights, seed).backward(BlockWeights(*weights), kept, grad)

        return compiled(run)(kept, grad, weights, self._seed)


class _DividedBlocks:
    """One block in three steps on each device, of which the second, attention, has other positions or heads.

    Args:
        stack: the layer.
        devices: the devices.
        patterns: of each device's attention; None where it has no head.
        parts: of each device, which positions it has.
        seed: of the block's dropout, or None.
        recompute: what `backward` computes again.
        exchange: a `ColumnsExchange` or `HeadsExchange`.
        heads: of each device's attention.
    """

    def __init__(self, stack, devices, patterns, parts, seed, recompute, exchange, heads):
        self._stack, self._devices, self._patterns, self._parts = stack, devices, patterns, parts
        self._seed, self._recompute = seed, recompute
        self._exchange, self._heads = exchange, heads

    def forward(self, streams, weights):
        """The block's outputs, and what `backward` takes of it."""
        gathered = self._gathered(streams, weights)
        attended = self._attended(gathered)
        heads = self._exchange.take([output for output, _ in attended])
        outputs = self._each(self._finish, streams, heads, weights)
        kept = {True: (streams,), "attention": (streams, attended), False: (streams, attended, gathered, heads)}
        return outputs, kept[self._recompute]

    def keep_inputs(self, streams):
        """What `forward` would have `backward` take, where that is the inputs alone."""
        return (streams,)

    def backward(self, kept, grads, weights):
        """Gradients of the inputs; and those of each device's weights."""
        streams, *more = kept
        attended = more[0] if more else None
        if len(more) == 3:
            _, gathered, heads = more
        else:
            gathered = self._gathered(on_each(self._devices, _after, streams, grads), weights)
            attended = attended or self._attended(gathered)
            heads = self._exchange.take([output for output, _ in attended])
        ends = self._each(self._finish_gradient, streams, heads, weights, grads)
        to_heads = self._exchange.take_gradient([of_heads for _, of_heads, _ in ends])
        to_units = self._exchange.put_gradient(self._each(self._attention_gradient, gathered, attended, to_heads))
        begins = self._each(self._project_gradient, streams, weights, to_units, [grad for grad, _, _ in ends])
        of_weights = [[*of_begin, *of_end] for (_, of_begin), (_, _, of_end) in zip(begins, ends, strict=True)]
        return [grad for grad, _ in begins], of_weights

    def _each(self, function, *lists):
        return on_each(self._devices, function, range(len(self._devices)), *lists)

    def _gathered(self, streams, weights):
        return self._exchange.put(self._each(self._project, streams, weights))

    def _attended(self, gathered):
        return self._each(self._attend, gathered)

    def _block(self, s, weights):
        return _block(self._stack, BlockWeights(*(w[0] for w in weights)), self._patterns[s], self._parts[s])

    def _project(self, s, stream, weights):
        return compiled(lambda x, w: self._block(s, w).query_key_value(x))(stream, weights)

    def _attend(self, s, units):
        if not self._heads[s]:
            return units, tf.zeros([tf.shape(units)[0], 0, units.shape[1]])
        output, log_sum_exp = self._attention(s).attend(units)
        return tf.reshape(output, [-1, units.shape[1], self._heads[s] * self._stack.value_dim]), log_sum_exp

    def _attention_gradient(self, s, units, attended, grad):
        if not self._heads[s]:
            return units
        shape = [-1, units.shape[1], self._heads[s], self._stack.value_dim]
        output, log_sum_exp = attended
        return self._attention(s).attention_gradient(
            units, tf.reshape(output, shape), log_sum_exp, tf.reshape(grad, shape)
        )

    def _attention(self, s):
        """The block of a device's heads, for its attention."""
        return _block(self._stack, None, self._patterns[s], None, self._heads[s])

    def _end(self, s, weights, seed):
        """The function of the stream, of heads and of the weights behind attention that ends the block."""

        def run(stream, heads, *behind):
            block = self._block(s, [*weights[:2], *behind])
            middle = block.add_attention(stream, heads, seed)
            return block.add_feed_forward(middle, block.hidden(middle), seed)

        return run

    def _finish(self, s, stream, heads, weights):
        def run(stream, heads, weights, seed):
            return self._end(s, weights, seed)(stream, heads, *weights[2:])

        return compiled(run)(stream, heads, weights, self._seed)

    def _finish_gradient(self, s, stream, heads, weights, grad):
        def run(stream, heads, weights, grad, seed):
            # Weights are the inputs that are differentiated for, behind the stream and the heads.
            _, back = vjp(self._end(s, weights, seed), (), stream, heads, *weights[2:])
            (to_stream, to_heads, *of_weights), _ = back(grad)
            return to_stream, to_heads, of_weights

        return compiled(run)(stream, heads, weights, grad, self._seed)

    def _project_gradient(self, s, stream, weights, grad, before):
        def run(stream, weights, grad, before):
            def project(stream, *first):
                return self._block(s, [*first, *weights[2:]]).query_key_value(stream)

            _, back = vjp(project, (), stream, *weights[:2])
            (to_stream, *of_weights), _ = back(grad)
            return before + to_stream, of_weights

        return compiled(run)(stream, weights, grad, before)


def compiled(function):
    """A function of tensors as one program of XLA's where it runs on a GPU."""
    if not ops.runs_on_a_gpu():
        return function
    return tf.function(function, jit_compile=True, autograph=False)


def _block(stack, weights, pattern, part, heads=None):
    heads = stack.num_heads if heads is None else heads
    return Block(weights, pattern, heads, stack.key_dim, stack.value_dim, stack.dropout, stack.epsilon, part)


def _of_block(weights, index, devices):
    """The weights of one block on each device, `[1, ...]`."""
    return on_each(devices, lambda of_device: [w[index : index + 1] for w in of_device], weights)


def _after(x, signal):
    """A tensor that is there only behind another: what is computed again of it does not begin before."""
    with tf.control_dependencies([signal]):
        return tf.identity(x)
