"""The loop over a stack's blocks, and its gradient: a second loop, backwards, from what the first has kept."""

import tensorflow as tf

from stf.layers.block import BlockWeights
from stf.ops.differentiation import differentiable_once

# The weights that each step of a block reads, as indices of `BlockWeights`.
PROJECT, COMBINE, HIDDEN, OUTPUT = slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)


class ResidualLoop:
    """Runs blocks one after another, one period of patterns an iteration; blocks left over follow the loop.

    Args:
        make_block: function of a block's index and weights that returns its `stf.layers.block.Block`. The index of a
            block in the loop is its index within the period.
        weights: `BlockWeights` of tensors `[block, ...]`.
        period: blocks after which the patterns begin again.
        recompute: what the gradient computes again, see `SparseResidualStack`.
        seed: int32 `[2]` of dropout, or None.
    """

    def __init__(self, make_block, weights, period, recompute, seed):
        self._make_block = make_block
        self._weights = weights
        self._period = period
        self._recompute = recompute
        self._seed = seed
        blocks = weights[0].shape[0]
        self._periods = blocks // period if blocks >= 2 * period else 0
        self._rest = range(self._periods * period, blocks)  # run without a loop

    def __call__(self, stream):
        """The blocks, differentiated by TensorFlow where they are: it keeps whatever it needs."""
        if self._periods:

            def body(i, stream):
                for k in range(self._period):
                    stream = self._block(i, k, self._weights)(stream, self._seed_of(i, k))
                return i + 1, stream

            _, stream = self._while(body, (0, stream))
        for j in self._rest:
            stream = self._block(0, j, self._weights)(stream, self._seed_of(0, j))
        return stream

    def differentiable(self, stream):
        """The blocks, with the gradient of this module. Differentiable once."""

        def forward(stream, *weights):
            return self.forward(stream, BlockWeights(*weights))

        def backward(kept, upstream, _, *weights):
            stream, grads = self.backward(BlockWeights(*weights), kept, upstream)
            return stream, *grads

        return differentiable_once(forward, backward)(stream, *self._weights)

    def _while(self, body, state):
        return tf.while_loop(lambda i, *_: i < self._periods, body, state, maximum_iterations=self._periods)

    def _block(self, i, k, weights):
        """Block k of the i-th period."""
        return self._make_block(k, BlockWeights(*(weight[i * self._period + k] for weight in weights)))

    def _seed_of(self, i, k):
        return None if self._seed is None else self._seed + tf.stack([i * self._period + k, 0])

    def forward(self, stream, weights):
        """The output, and what to keep: arrays over the loop's blocks, and a list over the rest."""
        looped = self._periods * self._period
        arrays = []
        if looped:
            specs = self._specs(stream, weights)
            arrays = [
                tf.TensorArray(dtype, size=looped, element_shape=shape, clear_after_read=False)
                for dtype, shape in specs
            ]

            def body(i, stream, *arrays):
                for k in range(self._period):
                    stream, kept = self._run(self._block(i, k, weights), stream, self._seed_of(i, k))
                    arrays = [array.write(i * self._period + k, x) for array, x in zip(arrays, kept, strict=True)]
                return i + 1, stream, *arrays

            _, stream, *arrays = self._while(body, (0, stream, *arrays))
        rest = []
        for j in self._rest:
            stream, kept = self._run(self._block(0, j, weights), stream, self._seed_of(0, j))
            rest.append(kept)
        return stream, (arrays, rest)

    def _run(self, block, stream, seed):
        """A block's output, and what is kept of it."""
        projected = block.query_key_value(stream)
        heads, log_sum_exp = block.attend(projected)
        middle = block.add_attention(stream, heads, seed)
        hidden = block.hidden(middle)
        output = block.add_feed_forward(middle, hidden, seed)
        kept = {
            True: (stream,),
            "attention": (stream, heads, log_sum_exp),
            False: (stream, heads, log_sum_exp, projected, middle, hidden),
        }
        return output, kept[self._recompute]

    def _specs(self, stream, weights):
        """Dtype and shape of each tensor that is kept of a block."""
        block = self._make_block(0, weights)
        batch, positions, width = stream.shape
        number = tf.float64 if stream.dtype == tf.float64 else tf.float32
        units = [weights.projection_bias.shape[-1], width, weights.hidden_bias.shape[-1]]
        specs = [
            (stream.dtype, [batch, positions, width]),
            (stream.dtype, [batch, positions, block.num_heads, block.value_dim]),
            (number, [batch, block.num_heads, positions]),
            *((stream.dtype, [batch, positions, width]) for width in units),
        ]
        return specs[: {True: 1, "attention": 3, False: 6}[self._recompute]]

    def backward(self, weights, kept, upstream):
        """Gradients of the stream and of all weights."""
        arrays, rest = kept
        of_rest = []
        for j, tensors in zip(reversed(self._rest), reversed(rest), strict=True):
            block = self._block(0, j, weights)
            upstream, grads = self._block_gradient(block, tensors, self._seed_of(0, j), upstream)
            of_rest.insert(0, grads)
        of_rest = [tf.stack(grads) for grads in zip(*of_rest, strict=True)]
        if not self._periods:
            return upstream, of_rest
        looped = self._periods * self._period
        sums = [tf.TensorArray(weight.dtype, size=looped, element_shape=weight.shape[1:]) for weight in weights]

        def body(step, upstream, *sums):
            i = self._periods - 1 - step
            for k in reversed(range(self._period)):
                j = i * self._period + k
                # Not stacked: outside XLA a GPU's gradients were wrong with stacks past 2^31 elements (docs/xla.md).
                tensors = [array.read(j) for array in arrays]
                block, seed = self._block(i, k, weights), self._seed_of(i, k)
                upstream, grads = self._block_gradient(block, tensors, seed, upstream)
                sums = [array.write(j, grad) for array, grad in zip(sums, grads, strict=True)]
            return step + 1, upstream, *sums

        _, upstream, *sums = self._while(body, (0, upstream, *sums))
        grads = [array.stack() for array in sums]
        if of_rest:
            grads = [tf.concat(pair, 0) for pair in zip(grads, of_rest, strict=True)]
        return upstream, grads

    def _block_gradient(self, block, kept, seed, upstream):
        """Gradients of a block's input and weights, from what was kept; the rest is computed again.

        Each step is differentiated by itself. What a step gave, where it was kept, is then not asked for, and the
        computation of it falls away from the graph.
        """
        weights = block.weights
        stream, *more = kept
        projected, project_back = vjp(block.query_key_value, weights[PROJECT], stream)
        if self._recompute is False:
            heads, log_sum_exp, projected, middle, hidden = more
        elif self._recompute == "attention":
            heads, log_sum_exp = more
        else:
            heads, log_sum_exp = block.attend(projected)
        added, combine_back = vjp(lambda *x: block.add_attention(*x, seed), weights[COMBINE], stream, heads)
        middle = middle if self._recompute is False else added
        pre, hidden_back = vjp(block.hidden, weights[HIDDEN], middle)
        hidden = hidden if self._recompute is False else pre
        _, output_back = vjp(lambda *x: block.add_feed_forward(*x, seed), weights[OUTPUT], middle, hidden)

        (middle_grad, hidden_grad), output_grads = output_back(upstream)
        (through,), hidden_grads = hidden_back(hidden_grad)
        (stream_grad, heads_grad), combine_grads = combine_back(middle_grad + through)
        (through,), project_grads = project_back(block.attention_gradient(projected, heads, log_sum_exp, heads_grad))
        return stream_grad + through, [*project_grads, *combine_grads, *hidden_grads, *output_grads]


def vjp(function, weights, *inputs):
    """A function's value, and the function from the value's gradient to those of the inputs and of the weights."""
    with tf.GradientTape() as tape:
        tape.watch([*inputs, *weights])
        value = function(*inputs)

    def back(upstream):
        grads = tape.gradient(value, [*inputs, *weights], upstream)
        return grads[: len(inputs)], grads[len(inputs) :]

    return value, back
