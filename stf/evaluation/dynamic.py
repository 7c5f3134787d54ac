"""Dynamic evaluation: a model that goes on learning from what it has just been scored on."""

import math
import numbers
import time
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from stf.evaluation.bits import Evaluation, progress_with_bits

LEAST = 0.1  # of the mean scale, beside a weight's own: a token that training data hardly had must not jump


def gradient_scales(model: keras.Model, dataset: tf.data.Dataset, verbose: int = 1) -> list[np.ndarray]:
    """The root mean square of each weight's gradient over batches: what `evaluate_dynamically` divides steps by.

    Args:
        model: a `SparseTransformer`.
        dataset: finite batches of the training data, (tokens, targets) or (tokens, targets, weights), of about the size
            of those that are evaluated: the fewer tokens a batch has, the noisier are its gradients.
        verbose: 1 shows a progress bar.

    Returns:
        A list of float32 NumPy arrays, of the shapes of all weights that a model has (frozen ones among them).

    Raises:
        ValueError: dataset has no batch.
    """
    model = _copy(model)
    squares = [tf.Variable(tf.zeros(weight.shape)) for weight in model.trainable_variables]
    losses_and_gradients = _losses_and_gradients(model)
    batches = 0
    bar = progress_with_bits(dataset, verbose)
    for tokens, targets, *weights in dataset:
        _, gradients = losses_and_gradients(tokens, targets, _weights_of(targets, weights))
        for square, gradient in zip(squares, gradients, strict=True):
            square.assign_add(tf.square(gradient))
        batches += 1
        bar.add(1)
    if not batches:
        raise ValueError("dataset must have a batch. Received: none")
    return [np.sqrt(square.numpy() / batches) for square in squares]


def evaluate_dynamically(
    model: keras.Model,
    dataset: tf.data.Dataset,
    scales: Sequence[np.ndarray],
    learning_rate: float = 3e-5,
    decay: float = 0.0,
    verbose: int = 1,
) -> Evaluation:
    """Mean bits for each token of a data set that is read once, in its order, by a model which learns as it reads.

    Each batch is scored with the weights as they are, and only then are the weights moved against the gradient of that
    batch's loss, each by its own scale (Krause et al. 2018, "Dynamic evaluation of neural sequence models"):

        w <- w - learning_rate g / (s + 0.1 mean(s)) + decay s / mean(s) (w_0 - w)

    with g the gradient, s its root mean square on training data, and w_0 the trained weights. `decay s / mean(s)` is
    at most 1, and g is clipped to the norm of s, so that no batch moves the weights further than one of training data
    does. No token is scored by weights that have seen it, so that these are bits of a code like any other.
    The model itself is left as it is; weights move in a copy that computes in float32.

    Examples:
        >>> model = stf.models.SparseTransformer(64, (8, 8), [stf.patterns.Fixed(8, 2)], 2, 2, 16)
        >>> text = np.frombuffer(b"to be or not to be, " * 40, np.uint8)
        >>> read = stf.data.windows(text, 64, batch_size=1, context=32)
        >>> scales = stf.evaluation.gradient_scales(model, read, verbose=0)
        >>> dynamic = stf.evaluation.evaluate_dynamically(model, read, scales, 1e-3, verbose=0)
        >>> dynamic.bits < stf.evaluation.evaluate(model, read, verbose=0).bits
        True

    Args:
        model: a `SparseTransformer`.
        dataset: finite batches of (tokens, targets) or (tokens, targets, weights). `stf.data.windows` with a batch size
            of 1 and a context that leaves few new positions learns soonest, and takes longest.
        scales: what `gradient_scales` found on training data.
        learning_rate: of a weight whose gradient is as large as it was on training data.
        decay: share by which a weight of mean scale goes back to what was trained, after each batch.
        verbose: 1 shows a progress bar with the bits so far.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: nothing counts, a number is out of its range, or the scales are not of this model.
    """
    if not (isinstance(learning_rate, numbers.Real) and 0 <= learning_rate < math.inf):
        raise ValueError(f"learning_rate must be 0 or more. Received: learning_rate={learning_rate!r}")
    if not (isinstance(decay, numbers.Real) and 0 <= decay <= 1):
        raise ValueError(f"decay must be from 0 to 1. Received: decay={decay!r}")
    model = _copy(model)
    shapes = [tuple(weight.shape) for weight in model.trainable_variables]
    if [np.shape(scale) for scale in scales] != shapes:
        raise ValueError(
            f"scales must be {len(shapes)} arrays, of the shapes of the model's weights, as gradient_scales "
            f"gives them. Received: {len(scales)} of shapes {[np.shape(scale) for scale in scales]}"
        )
    trained = [tf.identity(weight.value) for weight in model.trainable_variables]
    mean = sum(float(np.sum(scale, dtype=np.float64)) for scale in scales) / sum(map(np.size, scales))
    if not 0 < mean < math.inf:
        raise ValueError(f"scales must have a finite mean above 0. Received: scales of mean {mean}")
    usual = math.sqrt(sum(float(np.sum(np.square(scale, dtype=np.float64))) for scale in scales))
    rates = [tf.constant(learning_rate / (scale + LEAST * mean), tf.float32) for scale in scales]
    decays = [tf.constant(np.minimum(decay * scale / mean, 1), tf.float32) for scale in scales]
    losses_and_gradients = _losses_and_gradients(model)
    found, total, count, begin = [], 0.0, 0, time.perf_counter()
    bar = progress_with_bits(dataset, verbose)
    for tokens, targets, *weights in dataset:
        weights = _weights_of(targets, weights)
        losses, gradients = losses_and_gradients(tokens, targets, weights)
        gradients, _ = tf.clip_by_global_norm(gradients, usual)
        for weight, first, gradient, rate, back in zip(
            model.trainable_variables, trained, gradients, rates, decays, strict=True
        ):
            weight.assign(weight.value - rate * gradient + back * (first - weight.value))
        found.append(losses.numpy()[weights.numpy() > 0])
        total += found[-1].sum(dtype=np.float64)
        count += found[-1].size
        bar.add(1, [("bits", total / max(count, 1) / math.log(2))])
    if not count:
        raise ValueError("dataset must have a token that counts. Received: none")
    return Evaluation(float(total / count / math.log(2)), count, np.concatenate(found), time.perf_counter() - begin)


def _copy(model):
    """A model of its own weights, which computes in float32 and drops nothing."""
    copy = type(model).from_config(model.get_config() | {"dtype": "float32", "dropout": 0.0})
    copy.set_weights(model.get_weights())
    return copy


def _weights_of(targets, weights):
    """The weights of a batch that may have none."""
    return weights[0] if weights else tf.ones(tf.shape(targets))


def _losses_and_gradients(model):
    """The function from a batch to float32 losses in nats, and the gradients of the mean of those that count."""

    @tf.function(reduce_retracing=True)
    def losses_and_gradients(tokens, targets, weights):
        variables = [weight.value for weight in model.trainable_variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            logits = tf.cast(model(tokens, training=True), tf.float32)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
            mean = tf.reduce_sum(losses * weights) / tf.maximum(tf.reduce_sum(weights), 1)
        gradients = tape.gradient(mean, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return losses, [tf.convert_to_tensor(gradient) for gradient in gradients]

    return losses_and_gradients
