"""Gradients that are computed here, and not by TensorFlow from what it has kept."""

import tensorflow as tf


def differentiable_once(forward, backward):
    """A function whose gradient is given, and of which no tape sees, and so keeps, what happens within.

    Args:
        forward: function of tensors that returns a tensor, or a tuple of them, and whatever `backward` needs of it.
        backward: function of that, of the gradient of each returned tensor and of the inputs, that returns the inputs'
            gradients.

    Returns:
        A function of the tensors that returns what `forward` returns first. Differentiating it twice is a LookupError.
    """

    @tf.custom_gradient
    def run(*watched):
        inputs = [tf.stop_gradient(x) for x in watched]
        output, kept = forward(*inputs)

        count = len(output) if isinstance(output, tuple) else 1

        @tf.custom_gradient
        def gradient(*upstream_and_watched):
            upstream = [tf.stop_gradient(x) for x in upstream_and_watched[:count]]
            return tuple(backward(kept, *upstream, *inputs)), _not_twice

        return output, lambda *upstream: gradient(*upstream, *watched)  # so that a tape around this one asks again

    return run


def _not_twice(*grads):
    raise LookupError("SparseResidualStack is differentiable once in training; call it with training=False for more.")
