"""SparseResidualBlock: the equations, dropout, and what recomputing saves and leaves alone."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

from stf.layers import SparseResidualBlock, StridedAttention

BATCH, POSITIONS, WIDTH = 3, 11, 8


def make(recompute=False, dropout=0.4, seed=5, **kwargs):
    attention = StridedAttention(2, 4, 4, bias_initializer="normal", seed=1, **kwargs)
    return SparseResidualBlock(
        attention,
        dropout=dropout,
        recompute=recompute,
        bias_initializer="normal",
        seed=seed,
        **kwargs,
    )


def vectors():
    return tf.constant(np.random.default_rng(0).normal(size=(BATCH, POSITIONS, WIDTH)), tf.float32)


def test_is_equations_12_to_14():
    block, stream = make(dropout=0.0), vectors()
    got = block(stream)

    def norm(x, layer):
        x = x - tf.reduce_mean(x, -1, keepdims=True)
        x = x / tf.sqrt(tf.reduce_mean(x**2, -1, keepdims=True) + 1e-5)
        return x * layer.gamma + layer.beta

    a = block.attention(norm(stream, block.attention_norm))
    hidden = norm(stream + a, block.feed_forward_norm) @ block.hidden_dense.kernel.value
    hidden = hidden + block.hidden_dense.bias.value
    assert hidden.shape[-1] == 4 * WIDTH
    b = (hidden * tf.sigmoid(1.702 * hidden)) @ block.output_dense.kernel.value
    b = b + block.output_dense.bias.value
    np.testing.assert_allclose(got, stream + a + b, rtol=1e-4, atol=1e-5)


def test_dropout_is_at_the_two_additions_at_its_rate():
    block, stream = make(dropout=0.25), tf.random.stateless_normal([40, 50, WIDTH], [1, 2])
    block(stream)
    block.output_dense.kernel.assign(tf.zeros_like(block.output_dense.kernel))
    block.output_dense.bias.assign(tf.zeros_like(block.output_dense.bias))
    a = (block(stream) - stream).numpy()
    dropped = (block(stream, training=True) - stream).numpy()
    zero = dropped == 0
    assert abs(zero.mean() - 0.25) < 0.01
    np.testing.assert_allclose(dropped[~zero], a[~zero] / 0.75, rtol=1e-3, atol=1e-4)
    block.attention.output_dense.kernel.assign(0 * block.attention.output_dense.kernel.value)
    block.attention.output_dense.bias.assign(0 * block.attention.output_dense.bias.value)
    block.output_dense.bias.assign(tf.ones_like(block.output_dense.bias))
    b = (block(stream, training=True) - stream).numpy()
    assert abs((np.abs(b) < 1e-6).mean() - 0.25) < 0.01
    # The masks of the two additions, and of two calls, are independent.
    assert abs(((np.abs(b) < 1e-6) == zero).mean() - (0.25**2 + 0.75**2)) < 0.01


def test_dropout_draws_anew_each_call_repeats_by_seed_and_rests_outside_training():
    first, second, stream = make(seed=5), make(seed=5), vectors()
    one, two = first(stream, training=True), first(stream, training=True)
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(second(stream, training=True), one)
    np.testing.assert_array_equal(second(stream, training=True), two)
    np.testing.assert_array_equal(first(stream), first(stream))
    assert not np.array_equal(make(seed=6)(stream, training=True), one)


def gradients(block, stream, graph, steps=2):
    """Outputs and gradients of some training steps with random upstream gradients."""
    block(stream)
    upstream = tf.constant(np.random.default_rng(1).normal(size=stream.shape), tf.float32)

    def step(stream):
        with tf.GradientTape() as tape:
            tape.watch(stream)
            output = block(stream, training=True)
            loss = tf.reduce_sum(tf.cast(output, tf.float32) * upstream)
        wanted = [stream] + [variable.value for variable in block.trainable_variables]
        return [output, *tape.gradient(loss, wanted)]

    step = tf.function(step) if graph else step
    return [[tf.cast(x, tf.float32).numpy() for x in step(stream)] for _ in range(steps)]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_recomputing_leaves_gradients_alone_with_dropout_on(policy, graph):
    plain = gradients(make(False, dtype=policy), vectors(), graph)
    recomputed = gradients(make(True, dtype=policy), vectors(), graph)
    rounding = {"float32": 1e-5, "mixed_bfloat16": 2e-2, "mixed_float16": 2e-3}[policy]
    for step_plain, step_recomputed in zip(plain, recomputed, strict=True):
        scale = max(np.abs(x).max() for x in step_plain)
        for a, b in zip(step_plain, step_recomputed, strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=rounding * scale)
            assert np.isfinite(b).all()
    other = gradients(make(True, seed=6, dtype=policy), vectors(), graph)
    assert not np.allclose(other[0][1], plain[0][1], atol=0.1)  # the test would see a wrong mask


def stored_in_graph(block):
    """Floats that the forward pass hands to the backward pass: all, and by shape."""
    block(vectors())

    @tf.function
    def forward(stream):
        return block(stream, training=True)

    @tf.function
    def step(stream):
        with tf.GradientTape() as tape:
            tape.watch(stream)
            output = forward(stream)
        return tape.gradient(output, [stream] + [v.value for v in block.trainable_variables])

    graph = step.get_concrete_function(tf.TensorSpec([BATCH, POSITIONS, WIDTH])).graph
    calls = [op for op in graph.get_operations() if "PartitionedCall" in op.type]
    _, *stored = calls[0].outputs  # the output, and all that the backward function is given
    activations = [x for x in stored if x.shape.rank and x.shape[0] in (BATCH, BATCH * POSITIONS)]
    return sum(x.shape.num_elements() * x.dtype.size for x in activations) / 4


def test_recomputing_stores_the_stream_alone_in_a_graph():
    plain, recomputed = stored_in_graph(make(False)), stored_in_graph(make(True))
    stream = BATCH * POSITIONS * WIDTH
    assert recomputed <= 2 * stream  # H, and the same memory again as IdentityN hands it on
    assert plain >= 15 * stream  # norms, q, k, v, heads, masks and 4 + 4 of the feed-forward


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_recomputing_stores_the_stream_alone_eagerly():
    stream = tf.random.stateless_normal([4, 2048, 128], [1, 2])  # 4 MiB
    stored = {}
    for recompute in (False, True):
        attention = StridedAttention(2, 64, 32, mode="local")
        block = SparseResidualBlock(attention, dropout=0.1, recompute=recompute)
        block(stream, training=True)
        gc.collect()
        before = resident_bytes()
        with tf.GradientTape() as tape:
            output = stream
            for _ in range(4):
                output = block(output, training=True)
        stored[recompute] = (resident_bytes() - before) / (4 * 2**22)  # streams a block
        tape.gradient(output, block.trainable_variables[0].value)
        del tape, output
    assert stored[False] > 8
    assert stored[True] < 2


def test_lengths_and_masks_reach_the_attention_also_when_recomputed():
    lengths = np.array([POSITIONS, 5, 1])
    mask = np.arange(POSITIONS) < lengths[:, None]
    for recompute in (False, True):
        block = make(recompute, dropout=0.0)
        got = block(vectors(), lengths=lengths, training=True)
        np.testing.assert_array_equal(block(vectors(), mask=mask, training=True), got)
        alone = block(vectors()[1:2, :5])
        np.testing.assert_allclose(got[1:2, :5], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
def test_a_mask_that_keras_hands_on_is_that_of_the_gradients_too(jit_compile):
    """With documents a call has two tensors, for which Keras gives masks other names."""
    mask = np.arange(POSITIONS) < np.array([[POSITIONS], [5], [8]])
    stream = tf.where(mask[:, :, None], vectors(), 0)
    ids = np.tile(np.arange(POSITIONS) // 4, (3, 1))

    def step(block, masked, **arguments):
        def run(stream):
            with tf.GradientTape() as tape:
                x = keras.layers.Masking()(stream) if masked else stream
                loss = tf.reduce_sum(tf.where(mask[:, :, None], block(x, training=True, **arguments), 0) ** 2)
            return tape.gradient(loss, [variable.value for variable in block.trainable_variables])

        return (run if jit_compile is None else tf.function(run, jit_compile=jit_compile))(stream)

    cases = [{"segment_ids": ids}, {"document_starts": np.tile([0, 4, 8], (3, 1))}, {}]
    for documents in cases if jit_compile is None else cases[:1]:  # a compiler takes its time
        want = step(make(False, dropout=0.0), False, mask=mask, **documents)
        got = step(make(True, dropout=0.0), True, **documents)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_attention_may_have_a_policy_of_its_own():
    attention = StridedAttention(2, 4, 4, dtype="float32")
    block = SparseResidualBlock(attention, dropout=0.5, recompute=True, dtype="mixed_bfloat16")
    assert block(vectors(), training=True).dtype == tf.bfloat16
    assert attention(vectors()).dtype == tf.float32


def test_takes_a_users_attention_and_refuses_what_does_not_fit():
    dense = SparseResidualBlock(keras.layers.Dense(WIDTH), recompute=True)
    assert dense(vectors(), training=True).shape == (BATCH, POSITIONS, WIDTH)
    for arguments, says in [
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(dropout="0.5"), "dropout='0.5'"),
        (dict(dropout=None), "dropout=None"),
        (dict(ff_dim=0), "ff_dim=0"),
        (dict(ff_dim=4.0), "ff_dim=4.0"),
        (dict(ff_dim=True), "ff_dim=True"),
        (dict(epsilon=0), "epsilon=0"),
        (dict(epsilon="small"), "epsilon='small'"),
        (dict(seed="1"), "seed='1'"),
        (dict(attention=None), "attention=None"),
    ]:
        with pytest.raises(ValueError, match=says):
            SparseResidualBlock(**{"attention": StridedAttention(2, 4, 4), **arguments})
    noisy = StridedAttention(2, 4, 4, activity_regularizer="l2")
    with pytest.raises(ValueError, match="activity_regularizer"):
        SparseResidualBlock(noisy, recompute=True)
