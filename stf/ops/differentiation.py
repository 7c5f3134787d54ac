"""Gradients that are computed here, and not by TensorFlow from what it has kept."""

import tensorflow as tf


def differentiable_once(forward, backward):
    """A function whose gradient is given, and of which no tape sees, and so keeps, what happens within.

    Args:
        forward: function of tensors that returns a tensor and whatever `backward` needs of it.
        backward: function of that, of the gradient of the tensor and of the inputs, that returns the inputs' gradients.

    Returns:
        A function of the tensors that returns the tensor. Differentiating it twice is a LookupError.
    """

    @tf.custom_gradient
    def run(*watched):
        inputs = [tf.stop_gradient(x) for x in watched]
        output, kept = forward(*inputs)

        @tf.custom_gradient
        def gradient(upstream, *_):
            return tuple(backward(kept, tf.stop_gradient(upstream), *inputs)), _not_twice

        return output, lambda upstream: gradient(upstream, *watched)  # so that a tape around this one asks again

    return run


def _not_twice(*grads):
    raise LookupError("SparseResidualStack is differentiable once in training; call it with training=False for more.")
