"""Blocks that XLA compiles once for all of a kind."""

import keras
import tensorflow as tf


class CompiledBlocks:
    """Runs residual blocks as functions of their weights, so that blocks alike share one function.

    XLA fuses what stands between a block's matrix products, which makes a step on a GPU faster; but compiling all
    blocks of a deep model as one program takes minutes. Here each kind of block is compiled once, forward and
    backward, whatever the depth.
    """

    def __init__(self):
        self._functions = {}

    def __call__(self, kind, block, inputs, training=None):
        """`block(inputs, training=training)`.

        Args:
            kind: hashable; blocks of a kind differ in their weights and seeds alone.
            block: a built `stf.layers.SparseResidualBlock`.
            inputs: `[batch, position, width]`.
            training: whether dropout drops.
        """
        key = kind, bool(training)
        if key not in self._functions:
            self._functions[key] = self._function(block, bool(training))
        # Not `value`: that would cast, outside of what is compiled, to the dtype that the model computes in.
        weights = [tf.convert_to_tensor(weight._value) for weight in block.weights]
        seed = block.next_seed(training)
        return self._functions[key](inputs, tf.zeros([2], tf.int32) if seed is None else seed, *weights)

    @staticmethod
    def _function(block, training):
        """The function of all blocks like this one: of inputs, seed and weights."""
        drops = training and block.seed_generator is not None

        def run(inputs, seed, *weights):
            def residual(stream, *weights):
                with keras.StatelessScope(state_mapping=list(zip(block.weights, weights, strict=True))):
                    return block.residual(stream, seed=seed if drops else None)

            recomputes = block.recompute and training
            return (tf.recompute_grad(residual) if recomputes else residual)(inputs, *weights)

        return tf.function(run, jit_compile=True, reduce_retracing=True)
