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


PATTERNS = {
    "local, strided in turn": [stf.patterns.Local(7), stf.patterns.Strided(8)],
    "merged": [stf.patterns.Local(7) | stf.patterns.Strided(8)],
    "fixed": [stf.patterns.Fixed(8, 2)],
    "causal": [stf.patterns.Causal()],
    "by head": [stf.patterns.PerHead([stf.patterns.Local(5), stf.patterns.OwnBlock(6), stf.patterns.Strided(9)])],
    "blocks": [stf.patterns.Blocks(np.tril(np.random.default_rng(0).random((12, 12)) < 0.5), 8)],
}


def small(patterns, dtype, batch_size, cache_dtype=None):
    """A decoder of a model of three blocks, and random tokens for it."""
    model = stf.models.SparseTransformer(96, (8, 12), patterns, 3, 4, 48, key_dim=16, value_dim=8, dtype=dtype, seed=3)
    random = np.random.default_rng(0)
    model.logits.kernel.assign(random.normal(size=model.logits.kernel.shape))
    tokens = random.integers(0, 256, (batch_size, 96)).astype("int32")
    return Decoder(model, batch_size, 96, cache_dtype), tokens


def logits_of(decoder, tokens, begin=0):
    """Logits of the positions from `begin` on, step by step behind the prefix."""
    state, logits = decoder.prefill(tokens[:, :begin]), []
    for position in range(begin, 96):
        token = tokens[:, position - 1] if position else tokens[:, 0]
        out, state = decoder.step(state, token, position)
        logits.append(out.numpy())
    return np.stack(logits, 1)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [("float32", None), ("mixed_bfloat16", None), ("mixed_float16", None), ("mixed_bfloat16", "float32")],
)
@pytest.mark.parametrize("name", PATTERNS)
def test_the_op_is_as_near_the_truth_as_the_whole_sequence(name, dtype, cache_dtype):
    for batch_size, begin in ((1, 0), (5, 40), (20, 95)):
        decoder, tokens = small(PATTERNS[name], dtype, batch_size, cache_dtype)
        exact, _ = small(PATTERNS[name], "float64", batch_size)
        exact.model.set_weights(decoder.model.get_weights())
        with tf.device("CPU:0"):
            truth = exact.model(tokens).numpy()[:, begin:]
        allowed = np.abs(decoder.model(tokens).numpy()[:, begin:] - truth).max()
        error = np.abs(logits_of(decoder, tokens, begin) - truth).max()
        assert error <= 2 * allowed, f"{error / allowed:.2f} of the whole sequence's error, {batch_size}, {begin}"


def test_where_the_op_does_not_run_blocks_do(monkeypatch):
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        decoder, tokens = small(PATTERNS["merged"], "float32", 3)
        by_op = logits_of(decoder, tokens, 50)
        monkeypatch.setattr(stf.ops, "runs_residual_stack_decode", lambda *_: False)
        by_blocks = logits_of(small(PATTERNS["merged"], "float32", 3)[0], tokens, 50)
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(True)
    assert not np.array_equal(by_op, by_blocks)
    np.testing.assert_allclose(by_op, by_blocks, atol=2e-6 * np.abs(by_blocks).max(), rtol=0)


def test_caches_are_written_in_place(models):
    """A call of many tokens holds its state twice, as it came and as it goes, and no third time."""
    half, _ = models
    sampler = Sampler(half, batch_size=8, seed=1)
    sampler.draw(64)
    tf.config.experimental.reset_memory_stats("GPU:0")
    before = tf.config.experimental.get_memory_info("GPU:0")["current"]
    sampler.draw(64)
    beyond = tf.config.experimental.get_memory_info("GPU:0")["peak"] - before
    print(f"caches {sampler.cache_bytes / 2**20:.0f} MiB, peak beyond them {beyond / 2**20:.0f} MiB")
    assert beyond < 1.3 * sampler.cache_bytes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inputs": lambda x: x[None]}, r"input must be \[batch, width\].*\[1,2,48\]"),
        ({"reads": lambda x: x[1:]}, r"reads must have shape \[20\].*reads=\[19\]"),
        ({"writes": lambda x: x[1:]}, r"writes must have shape \[2\].*writes=\[1\]"),
        ({"keys": lambda x: x[:1], "values": lambda x: x[:1]}, "keys and values must have a tensor.* 2 parts.* 1"),
        (
            {name: lambda x: [tf.cast(y, tf.bfloat16) for y in x] for name in ("keys", "values")},
            "keys must be of the input's dtype, float, or float.*bfloat16",
        ),
        ({"keys": lambda x: [x[0][1:], *x[1:]]}, r"keys must have slots for 3 layers.*23 slots"),
        ({"values": lambda x: [x[0][..., :4], *x[1:]]}, r"values must have shape \[24,2,4,8\].*values=\[24,2,4,4\]"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_the_op_refuses_what_does_not_fit(changed, message):
    decoder, _ = small(PATTERNS["merged"], "float32", 2)
    [cache], stack = decoder.caches, decoder.model.stack
    tensors = cache.zeros(2)
    arguments = {
        "inputs": tf.zeros([2, 48]),
        "reads": cache.reads(tf.constant(5)),
        "writes": cache.writes(tf.constant(5)),
        "keys": tensors[0::2],
        "values": tensors[1::2],
    }
    for name, change in changed.items():
        arguments[name] = change(arguments[name])

    @tf.function(jit_compile=True)
    def run():
        return stf.ops.residual_stack_decode(
            weights=stack.stacked_weights(),
            part_reads=[cache.part_reads],
            num_heads=4,
            key_dim=16,
            epsilon=1e-5,
            **arguments,
        )[0]

    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        run()
