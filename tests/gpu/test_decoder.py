"""Generation on a GPU: the paper's model at its size, prefix and steps beside the whole sequence."""

import numpy as np
import pytest
import tensorflow as tf

pytestmark = pytest.mark.gpu
if not tf.config.list_physical_devices("GPU"):
    pytest.skip("no GPU", allow_module_level=True)

import stf  # noqa: E402
from stf.generation import Decoder, Sampler  # noqa: E402


@pytest.fixture(scope="module")
def models():
    """CIFAR-10's model of 128 blocks in bfloat16 and, with the same weights, in float32; its logits are not 0."""
    half = stf.models.SparseTransformer.from_preset("cifar10", dtype="mixed_bfloat16", seed=1)
    exact = stf.models.SparseTransformer.from_preset("cifar10", dtype="float32", seed=1)
    random = np.random.default_rng(0)
    half.logits.kernel.assign(random.normal(size=half.logits.kernel.shape) * 0.1)
    exact.set_weights(half.get_weights())
    return half, exact


def test_prefix_and_steps_are_as_near_the_truth_as_the_whole_sequence(models):
    half, exact = models
    tokens = np.random.default_rng(1).integers(0, 256, (2, half.length)).astype("int32")
    begin, steps = 3000, 40
    truth = exact(tokens).numpy()[:, begin : begin + steps]
    allowed = np.abs(half(tokens).numpy()[:, begin : begin + steps] - truth).max()
    decoder = Decoder(half, 2, half.length)
    state, error = decoder.prefill(tokens[:, :begin]), 0
    for position in range(begin, begin + steps):
        logits, state = decoder.step(state, tokens[:, position - 1], position)
        error = max(error, np.abs(logits.numpy() - truth[:, position - begin]).max())
    print(f"largest error {error:.4f}, of the whole sequence {allowed:.4f}, of logits up to {np.abs(truth).max():.2f}")
    assert error <= 2 * allowed


def test_the_same_tokens_twice_and_however_they_are_drawn(models):
    half, _ = models
    drawn = []
    for counts in ((96,), (96,), (1, 31, 64)):
        sampler = Sampler(half, batch_size=4, seed=2, top_p=0.9)
        for count in counts:
            sampler.draw(count)
        drawn.append(sampler.tokens)
    np.testing.assert_array_equal(drawn[1], drawn[0])
    np.testing.assert_array_equal(drawn[2], drawn[0])
