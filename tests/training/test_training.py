"""The recipe's parts: schedule, loss scale, average, bits per dim. The optimizer's updates: test_optimizer.py."""

import contextlib

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


@contextlib.contextmanager
def global_policy(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def small_model(dtype=None, **arguments):
    model = SparseTransformer(24, (4, 6), [Local(6)], 1, 2, 8, vocab_size=16, seed=1, dtype=dtype)
    model.compile(optimizer(1e-2, **arguments), cross_entropy(), metrics=[BitsPerDim()])
    return model


def tokens():
    return np.random.default_rng(0).integers(0, 16, (8, 24)).astype(np.int32)


@pytest.mark.parametrize("elsewhere", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "float64", None])
def test_the_loss_is_scaled_by_the_models_policy_and_not_by_the_global_one(policy, elsewhere):
    with global_policy(elsewhere):
        made = small_model(policy).optimizer
    assert isinstance(optimizer(1e-3), AdamW)
    if (policy or elsewhere) != "mixed_float16":
        assert type(made) is AdamW
        return
    assert type(made) is LossScale and type(made.inner_optimizer) is AdamW
    assert (made.initial_scale, float(made.dynamic_scale), made.floor) == (2.0**16, 2.0**16, 2.0**10)


def test_a_loss_scale_of_the_users_own_is_left_alone():
    model = small_model("mixed_float16")
    for own in (
        LossScale(optimizer(1e-2), initial_scale=2.0**12),
        keras.optimizers.LossScaleOptimizer(optimizer(1e-2)),
    ):
        model.compile(own, cross_entropy())
        assert model.optimizer is own
    model.compile(optimizer(1e-2), cross_entropy(), auto_scale_loss=False)
    assert type(model.optimizer) is AdamW


def test_a_scaled_loss_is_trained_on_as_an_unscaled_one():
    x, losses = tokens(), {}
    for policy in ("float32", "mixed_float16"):
        model = small_model(policy)
        history = model.fit(x, x, batch_size=4, epochs=6, shuffle=False, verbose=0).history
        losses[policy] = history["loss"]
        inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        assert (int(inner.skipped), int(inner.iterations), steps_taken(model.optimizer)) == (0, 12, 12)
        assert 1e-2 < float(inner.gradient_norm) < 10  # of the loss itself
    np.testing.assert_allclose(losses["mixed_float16"], losses["float32"], rtol=2e-3)
    assert losses["float32"][-1] < losses["float32"][0] - 0.1


@pytest.mark.parametrize("policy", ["float32", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_a_compiled_model_comes_back_as_it_was_and_goes_on_the_same(policy, tmp_path):
    x = tokens()
    schedule = WarmupCosine(1e-2, total_steps=40, warmup_steps=3)
    model = small_model(policy)
    inner = optimizer(schedule, average=0.9, accumulation_steps=3, weight_decay=0.02, beta_2=0.95)
    model.compile(inner, cross_entropy(), metrics=[BitsPerDim()])
    checkpoint = Checkpoint(tmp_path / "c.keras")
    checkpoint.set_model(model)
    for batch in (x[:4], x[4:], x[:4], x[4:]):  # an update, and a part of the next
        model.train_on_batch(batch, batch)
    checkpoint.save()
    checkpoint.wait()
    loaded = keras.saving.load_model(tmp_path / "c.keras")
    assert type(loaded.optimizer) is (LossScale if policy == "mixed_float16" else AdamW)
    assert loaded.dtype_policy.name == policy
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert steps_taken(loaded.optimizer) == 4 and int(loaded.optimizer.iterations) == int(model.optimizer.iterations)
    for _ in range(2):
        assert len(loaded.optimizer.variables) == len(model.optimizer.variables) > 60
        both = (either.variables + either.optimizer.variables for either in (loaded, model))
        for a, b in zip(*both, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=b.path)
        for (_, a), (_, b) in zip(averages(loaded.optimizer), averages(model.optimizer), strict=True):
            np.testing.assert_array_equal(a, b)
        for either in (model, loaded):
            for batch in (x[:4], x[4:]):
                either.train_on_batch(batch, batch)


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


class TwiceTheLogits(keras.metrics.Mean):
    """A metric with a softmax of its own."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(keras.ops.max(keras.ops.softmax(2 * y_pred)))


def exponentials(metrics):
    """How many a training step computes, as XLA compiles it."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([24], dtype="int32"), keras.layers.Embedding(16, 8), keras.layers.Dense(16)])
    model.compile(optimizer(1e-2), cross_entropy(), metrics=metrics)
    x = tf.constant(tokens())
    model.train_on_batch(x, x)  # makes all variables
    step = tf.function(lambda x: model.train_step((x, x)), jit_compile=True)
    return step.experimental_get_compiler_ir(x)(stage="optimized_hlo").count(" exponential(")


def test_bits_per_dim_shares_the_losses_log_softmax():
    without = exponentials(None)
    assert exponentials([BitsPerDim()]) == without >= 1
    assert exponentials([TwiceTheLogits()]) > without  # the count would tell
