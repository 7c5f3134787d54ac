"""The recipe's parts: schedule, decay, clipping, the loss scale's floor, bits per dim."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from stf.callbacks import Checkpoint, MovingAverage
from stf.models import SparseTransformer
from stf.patterns import Local
from stf.training import (
    AdamW,
    BitsPerDim,
    LossScale,
    WarmupCosine,
    averages,
    cross_entropy,
    optimizer,
    steps_taken,
    use_average,
)


def test_schedule_rises_linearly_and_falls_as_a_cosine():
    rate = WarmupCosine(0.5, total_steps=110, warmup_steps=10)
    rates = np.array([float(rate(step)) for step in range(112)])
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(rates[10:110], 0.25 * (1 + np.cos(np.pi * np.arange(100) / 100)), rtol=1e-4, atol=1e-7)
    assert rates[110] == rates[111] == 0
    again = WarmupCosine.from_config(rate.get_config())
    assert float(again(37)) == rates[37]
    with pytest.raises(ValueError, match="warmup_steps=6"):
        WarmupCosine(1.0, total_steps=5, warmup_steps=6)


def test_only_tensors_of_two_or_more_dimensions_decay():
    matrix, vector = keras.Variable(np.ones((2, 3))), keras.Variable(np.ones(3))
    adam = AdamW(0.1, weight_decay=0.5)
    adam.build([matrix, vector])
    adam.apply([tf.zeros([2, 3]), tf.zeros([3])], [matrix, vector])
    np.testing.assert_allclose(matrix, np.full((2, 3), 1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(vector, np.ones(3))


def test_gradients_are_clipped_to_a_global_norm_of_1_and_the_norm_is_told():
    seen = []
    for size in (1.0, 100.0):
        weight = keras.Variable(np.zeros((2, 2)))
        whole = optimizer(0.1, weight_decay=0.0, epsilon=1.0)  # so large an epsilon shows the gradient's size
        whole.build([weight])
        whole.apply([tf.fill([2, 2], size)], [weight])
        seen.append((weight.numpy(), float(whole.inner_optimizer.gradient_norm)))
    np.testing.assert_allclose(seen[0][0], seen[1][0], rtol=1e-5)
    assert [norm for _, norm in seen] == pytest.approx([2.0, 200.0])


def test_loss_scale_stops_at_its_floor_and_recovers():
    weight = keras.Variable(1.0)
    scale = LossScale(keras.optimizers.SGD(0.1), initial_scale=2.0**12, floor=2.0**10, dynamic_growth_steps=3)
    scale.build([weight])
    for _ in range(60):
        scale.apply([tf.constant(np.inf)], [weight])
    assert float(scale.dynamic_scale) == 2.0**10
    assert weight.numpy() == 1.0  # skipped
    for _ in range(3):
        scale.apply([tf.constant(2.0**10)], [weight])
    assert float(scale.dynamic_scale) == 2.0**11
    assert weight.numpy() == pytest.approx(0.7)
    assert LossScale.from_config(scale.get_config()).floor == 2.0**10
    with pytest.raises(ValueError, match="floor=0"):
        LossScale(keras.optimizers.SGD(), floor=0)


def test_optimizer_scales_the_loss_under_mixed_float16_alone():
    for policy, scale in (("float32", 1.0), ("mixed_bfloat16", 1.0), ("mixed_float16", 2.0**16)):
        keras.config.set_dtype_policy(policy)
        try:
            made = optimizer(1e-3)
            assert isinstance(made, LossScale) and isinstance(made.inner_optimizer, AdamW)
            assert made.initial_scale == scale
        finally:
            keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("jit_compile", [False, True])
def test_steps_that_are_not_finite_are_skipped_and_counted(jit_compile):
    weight = keras.Variable(np.ones(3, "float32"))
    whole = optimizer(0.1)
    whole.build([weight])
    step = tf.function(lambda x: whole.apply([x], [weight]), jit_compile=jit_compile)
    for gradient, moved, counts in (
        (1.0, True, (0, 0)),
        (np.nan, False, (1, 1)),
        (-np.inf, False, (2, 2)),
        (2.0, True, (2, 0)),
        (np.inf, False, (3, 1)),
    ):
        before = weight.numpy()
        step(tf.constant([0.5, gradient, 0.5], tf.float32))
        assert np.isfinite(weight.numpy()).all()
        assert np.array_equal(weight.numpy(), before) != moved
        assert (int(whole.skipped), int(whole.skipped_in_a_row)) == counts
    assert steps_taken(whole) == 5 and int(whole.iterations) == 2
    assert float(whole.dynamic_scale) == 1.0


def small_model(**arguments):
    model = SparseTransformer(24, (4, 6), [Local(6)], 1, 2, 8, vocab_size=16, seed=1)
    model.compile(optimizer(1e-2, **arguments), cross_entropy(), metrics=[BitsPerDim()])
    return model


def test_validation_sees_the_average_and_training_does_not_notice(tmp_path):
    x = np.random.default_rng(0).integers(0, 16, (8, 24)).astype(np.int32)
    options = dict(batch_size=4, epochs=2, shuffle=False, verbose=0)
    plain, averaged = small_model(average=0.9), small_model(average=0.9)
    plain.fit(x, x, **options)
    history = averaged.fit(x, x, validation_data=(x, x), callbacks=[MovingAverage()], **options).history
    for a, b in zip(plain.get_weights(), averaged.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)  # the averages: Keras puts them there at the end of fit
    # What validation saw last is what stands in the model now.
    assert averaged.evaluate(x, x, verbose=0, return_dict=True)["loss"] == pytest.approx(
        history["val_loss"][-1], rel=1e-5
    )


def test_average_is_the_weighted_mean_of_all_weights():
    weight = keras.Variable(np.zeros(2, "float32"))
    whole = optimizer(0.1, average=0.5, weight_decay=0.0)
    whole.build([weight])
    expected = None
    for _ in range(4):
        whole.apply([tf.constant([1.0, -2.0])], [weight])
        expected = weight.numpy() if expected is None else 0.5 * expected + 0.5 * weight.numpy()
    [(held, average)] = averages(whole)
    assert held is weight
    np.testing.assert_allclose(average, expected, rtol=1e-6)
    assert averages(optimizer(0.1)) == []


def test_a_loaded_model_can_use_its_average(tmp_path):
    x = np.random.default_rng(0).integers(0, 16, (8, 24)).astype(np.int32)
    model = small_model(average=0.9)
    model.fit(x, x, batch_size=4, verbose=0, callbacks=[Checkpoint(tmp_path / "c.keras")])
    loaded = keras.saving.load_model(tmp_path / "c.keras")
    assert not np.array_equal(loaded.logits.kernel, model.logits.kernel)  # saved while training was under way
    use_average(loaded)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_accumulate_over_steps():
    """Two half batches are one whole batch."""
    x = np.random.default_rng(0).integers(0, 16, (8, 24)).astype(np.int32)
    whole, halves = small_model(), small_model(gradient_accumulation_steps=2)
    whole.fit(x, x, batch_size=8, epochs=3, shuffle=False, verbose=0)
    halves.fit(x, x, batch_size=4, epochs=3, shuffle=False, verbose=0)
    for a, b in zip(whole.get_weights(), halves.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_bits_per_dim_is_the_mean_over_all_tokens_of_all_batches():
    random = np.random.default_rng(0)
    metric, nats = BitsPerDim(), []
    for batch in (3, 1):
        tokens, logits = random.integers(0, 7, (batch, 5)), random.normal(size=(batch, 5, 7)).astype("float32")
        metric.update_state(tokens, logits)
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        nats += list(-np.log(np.take_along_axis(probabilities, tokens[..., None], -1)).ravel())
    assert float(metric.result()) == pytest.approx(np.mean(nats) / np.log(2), rel=1e-5)
    metric.reset_state()
    metric.update_state(tokens, np.zeros((1, 5, 7), "float32"))
    assert float(metric.result()) == pytest.approx(np.log2(7), rel=1e-6)
    assert float(cross_entropy()(tokens, np.zeros((1, 5, 7), "float32"))) == pytest.approx(np.log(7), rel=1e-6)
    metric.reset_state()
    metric.update_state(tokens, logits, sample_weight=np.array([[1, 0, 0, 0, 0]]))
    assert float(metric.result()) == pytest.approx(nats[-5] / np.log(2), rel=1e-5)
