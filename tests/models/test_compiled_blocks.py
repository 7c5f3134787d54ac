"""Blocks compiled once for all of a kind: the same numbers as without, whatever the policy and the depth."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import stf

PATTERNS = [stf.patterns.Local(4), stf.patterns.Strided(4)]


def make(compile_blocks, **arguments):
    keras.utils.set_random_seed(3)
    defaults = dict(
        length=24,
        position_shape=(6, 4),
        patterns=PATTERNS,
        num_blocks=2,
        num_heads=2,
        model_dim=16,
        vocab_size=11,
        seed=1,
        compile_blocks=compile_blocks,
    )
    model = stf.models.SparseTransformer(**(defaults | arguments))
    model.logits.kernel.assign(np.random.default_rng(0).normal(size=model.logits.kernel.shape))
    return model


def tokens(batch=4):
    return np.random.default_rng(0).integers(0, 11, (batch, 24)).astype("int32")


def gradients(model, x):
    with tf.GradientTape() as tape:
        loss = stf.training.cross_entropy()(x, model(x, training=True))
    return float(loss), tape.gradient(loss, model.trainable_weights)


@pytest.mark.parametrize(
    ("policy", "recompute"),
    [("float32", False), ("float32", True), ("mixed_bfloat16", True), ("mixed_float16", False)],
)
def test_same_outputs_and_gradients_as_without(policy, recompute):
    options = dict(dtype=policy, recompute=recompute, dropout=0.3)
    plain, compiled = make(False, **options), make(True, **options)
    x = tokens()
    exact = make(False, dropout=0.0)
    tolerance = {"float32": 2e-5, "mixed_bfloat16": 5e-2, "mixed_float16": 6e-3}[policy]
    np.testing.assert_allclose(compiled(x), plain(x), atol=tolerance * np.abs(exact(x)).max())
    (loss, grads), (expected, expected_grads) = gradients(compiled, x), gradients(plain, x)
    assert loss == pytest.approx(expected, rel=tolerance)
    for weight, grad, other in zip(plain.trainable_weights, grads, expected_grads, strict=True):
        if isinstance(other, tf.IndexedSlices):
            grad, other = tf.convert_to_tensor(grad), tf.convert_to_tensor(other)
        scale = max(np.abs(other).max(), 1e-3)
        np.testing.assert_allclose(grad, other, atol=4 * tolerance * scale, err_msg=weight.path)


def test_each_kind_of_block_is_traced_once_whatever_the_depth():
    model = make(True, num_blocks=5, patterns=[*PATTERNS, PATTERNS[0]])
    model.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy())
    x = tokens()
    model.fit(x, x, batch_size=2, verbose=0)
    functions = model._compiled_blocks._functions
    assert set(functions) == {(pattern, True) for pattern in PATTERNS}
    assert [f.experimental_get_tracing_count() for f in functions.values()] == [1, 1]


def test_fit_gives_the_same_losses():
    losses = []
    x = tokens()
    for compile_blocks in (False, True):
        model = make(compile_blocks, recompute=True, dropout=0.1)
        model.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy())
        losses.append(model.fit(x, x, batch_size=2, epochs=4, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_saved_loaded_and_exported(tmp_path):
    model, x = make(True), tokens()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.compile_blocks is True
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-6)
    model.export(tmp_path / "exported", verbose=False)
    restored = tf.saved_model.load(tmp_path / "exported")  # `serve` alone would not keep the variables
    np.testing.assert_allclose(restored.serve(x), model(x), atol=1e-5)


@pytest.mark.slow
def test_whole_step_may_be_compiled_around_it():
    model, x = make(True, dropout=0.1), tokens()
    model.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy(), jit_compile=True)
    assert np.isfinite(model.fit(x, x, batch_size=2, verbose=0).history["loss"]).all()
