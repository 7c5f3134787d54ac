"""AdamW's updates: clipping, decay, steps left out, accumulation, and a run that is taken up in the midst of one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import stf
from stf.models import SparseTransformer
from stf.patterns import Local, Strided
from stf.training import AdamW, BitsPerDim, LossScale, cross_entropy, optimizer, steps_taken


def small_model(dtype=None, num_blocks=1, dropout=0.0, **arguments):
    patterns = [Local(6), Strided(6)]
    model = SparseTransformer(
        24, (4, 6), patterns, num_blocks, 2, 8, vocab_size=16, dropout=dropout, seed=1, dtype=dtype
    )
    model.compile(optimizer(1e-2, **arguments), cross_entropy(), metrics=[BitsPerDim()])
    return model


def tokens(count=8):
    return np.random.default_rng(0).integers(0, 16, (count, 24)).astype(np.int32)


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
        seen.append((weight.numpy(), float(whole.gradient_norm)))
    np.testing.assert_allclose(seen[0][0], seen[1][0], rtol=1e-5)
    assert [norm for _, norm in seen] == pytest.approx([2.0, 200.0])


def dense_gradients(model, x):
    """In float64 the gradient of every weight, that of the token table summed up by NumPy; and the table's by rows."""
    exact = SparseTransformer.from_config(model.get_config() | {"dtype": "float64"})
    exact.set_weights(model.get_weights())
    weights = [weight.value for weight in exact.trainable_variables]
    with tf.GradientTape() as tape:
        stream = exact.embedding(x)
        tape.watch(stream)
        logits = exact.logits(exact.final_norm(exact.stack(stream)))
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(x, logits))
    grads, of_stream = tape.gradient(loss, [weights, stream])
    grads = {weight.path: grad for weight, grad in zip(model.trainable_variables, grads, strict=True)}
    table = np.zeros(exact.embedding.tokens.shape)
    np.add.at(table, x[:, :-1], of_stream[:, 1:].numpy())
    grads[model.embedding.tokens.path] = table
    return {path: np.asarray(grad) for path, grad in grads.items()}, of_stream[:, 1:].numpy()


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_an_update_is_the_dense_gradient_clipped_also_where_a_token_repeats(policy):
    model, epsilon = small_model(policy, num_blocks=2), 1e4
    # So large an epsilon makes Adam's first step one along the gradient, as long as the clipped gradient.
    adam = AdamW(epsilon / 0.001**0.5, weight_decay=0.0, epsilon=epsilon)
    # Gradients as large as these take a small scale.
    model.compile(LossScale(adam, 16.0, floor=1.0) if policy == "mixed_float16" else adam, cross_entropy())
    model.logits.kernel.assign(10 * np.random.default_rng(0).normal(size=(8, 16)))
    x = np.full((2, 24), 5, np.int32)
    x[:, 20:] = 7
    expected, rows = dense_gradients(model, x)
    squares = {path: np.sum(grad**2) for path, grad in expected.items()}
    norm = np.sqrt(sum(squares.values()))
    of_list = np.sqrt(norm**2 - squares[model.embedding.tokens.path] + np.sum(rows**2))
    assert norm > 5 and abs(of_list / norm - 1) > 0.05  # a norm of the rows one by one would show
    before = [weight.numpy() for weight in model.trainable_variables]
    model.train_on_batch(x, x)
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    tolerance = {"float32": 1e-4, "mixed_bfloat16": 3e-2, "mixed_float16": 4e-3}[policy]
    assert float(inner.gradient_norm) == pytest.approx(norm, rel=tolerance)
    updates = [old - weight.numpy() for old, weight in zip(before, model.trainable_variables, strict=True)]
    total = np.sqrt(sum(np.sum(update.astype(np.float64) ** 2) for update in updates))
    assert 0.999 < total <= 1 + 1e-4
    for weight, update in zip(model.trainable_variables, updates, strict=True):
        np.testing.assert_allclose(update, expected[weight.path] / norm, atol=2 * tolerance, err_msg=weight.path)
    [moved] = [u for w, u in zip(model.trainable_variables, updates, strict=True) if w is model.embedding.tokens]
    assert set(np.flatnonzero(np.abs(moved).sum(-1))) == {5, 7}


def test_of_stacked_weights_kernels_decay_and_biases_and_scales_do_not():
    model = small_model(num_blocks=3, weight_decay=0.5)
    for weight in model.trainable_variables:
        weight.assign(np.ones(weight.shape))
    model.optimizer.apply([tf.zeros(weight.shape) for weight in model.trainable_variables], model.trainable_variables)
    decays = {"tokens", "axis_0", "axis_1", "logits/kernel"}
    decays |= {f"{name}_kernel" for name in ("projection", "attention_output", "hidden", "output")}
    for weight in model.trainable_variables:
        name = weight.path.split("/")[-1]
        name = "logits/kernel" if name == "kernel" else name
        value = 1 - 1e-2 * 0.5 if name in decays else 1.0
        np.testing.assert_allclose(weight, np.full(weight.shape, value), rtol=1e-6, err_msg=weight.path)
        decays.discard(name)
    assert not decays


def test_biases_of_any_shape_do_not_decay():
    layer = stf.layers.SparseAttention(2, 4, Local(3))
    layer.build((None, None, 8))
    adam = AdamW(0.1, weight_decay=0.5)
    for weight in layer.trainable_variables:
        weight.assign(np.ones(weight.shape))
    adam.build(layer.trainable_variables)
    adam.apply([tf.zeros(weight.shape) for weight in layer.trainable_variables], layer.trainable_variables)
    assert any(len(weight.shape) > 1 and weight.name == "bias" for weight in layer.trainable_variables)
    for weight in layer.trainable_variables:
        value = 1.0 if weight.name == "bias" else 0.95
        np.testing.assert_allclose(weight, np.full(weight.shape, value), rtol=1e-6, err_msg=weight.path)


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


@pytest.mark.parametrize("wrap", [lambda adam: adam, LossScale], ids=["AdamW", "LossScale"])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_step_that_is_not_finite_leaves_all_but_its_counts_to_the_last_bit(accumulation_steps, wrap):
    weights = [keras.Variable(np.ones(3, "float32")), keras.Variable(np.ones((2, 2), "float32"))]
    whole = wrap(optimizer(0.1, average=0.9, accumulation_steps=accumulation_steps))
    whole.build(weights)
    good = [tf.constant([0.5, 1.0, 2.0]), tf.ones([2, 2])]
    for _ in range(3):
        whole.apply(good, weights)
    counts = {"batches", "skipped", "skipped_in_a_row", "dynamic_scale", "step_counter"}
    before = {variable.path: variable.numpy() for variable in [*weights, *whole.variables]}
    whole.apply([good[0], tf.constant([[1.0, np.inf], [0.0, 1.0]])], weights)
    whole.apply([tf.constant([np.nan, 0.0, 0.0]), good[1]], weights)
    for variable in [*weights, *whole.variables]:
        if variable.path.split("/")[-1] not in counts:
            np.testing.assert_array_equal(variable, before[variable.path], err_msg=variable.path)
    assert steps_taken(whole) == 5


def test_gradients_accumulate_over_steps():
    """Two half batches are one whole batch."""
    x = tokens()
    whole, halves = small_model(), small_model(accumulation_steps=2)
    whole.fit(x, x, batch_size=8, epochs=3, shuffle=False, verbose=0)
    halves.fit(x, x, batch_size=4, epochs=3, shuffle=False, verbose=0)
    for a, b in zip(whole.get_weights(), halves.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert (int(whole.optimizer.iterations), steps_taken(whole.optimizer)) == (3, 3)
    assert (int(halves.optimizer.iterations), steps_taken(halves.optimizer)) == (3, 6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_batches_that_are_not_finite_are_left_out_of_an_accumulation(jit_compile):
    """The update is that of the finite batches alone, as many as it always takes."""
    random = np.random.default_rng(0)
    good = [random.normal(size=(2, 3)).astype("float32") for _ in range(6)]
    bad = np.full((2, 3), np.nan, "float32")
    ends = []
    for batches in (good, [bad, good[0], good[1], bad, bad, *good[2:5], bad, good[5]]):
        weight = keras.Variable(np.ones((2, 3), "float32"))
        whole = optimizer(0.1, accumulation_steps=3)
        whole.build([weight])
        step = tf.function(lambda x: whole.apply([x], [weight]), jit_compile=jit_compile)
        moved = []
        for batch in batches:
            before = weight.numpy()
            step(tf.constant(batch))
            moved.append(not np.array_equal(before, weight))
        ends.append([weight.numpy(), float(whole.gradient_norm)])
        assert int(whole.iterations) == 2 and steps_taken(whole) == len(batches)
        assert int(whole.skipped) == sum(batch is bad for batch in batches)
        assert np.flatnonzero(moved).tolist() == ([2, 5] if len(batches) == 6 else [5, 9])
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1] == pytest.approx(np.linalg.norm(np.mean(good[3:], 0)), rel=1e-5)


class StoppedError(Exception):
    """What ends a run in these tests."""


class StopAfter(keras.callbacks.Callback):
    """Ends a run after an epoch, its checkpoint written."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise StoppedError


@pytest.mark.parametrize(
    ("policy", "dropout"),
    [
        pytest.param("float32", 0.0, marks=pytest.mark.slow),
        pytest.param("mixed_float16", 0.0, marks=pytest.mark.slow),
        ("float32", 0.2),
    ],
)
def test_a_run_taken_up_in_the_midst_of_an_accumulation_ends_bit_for_bit(policy, dropout, tmp_path, capsys):
    x = tokens(64)
    seen = []

    def train(done, shard=(0, 1)):
        seen.append(done)
        batches = tf.data.Dataset.from_tensor_slices(x).batch(4, drop_remainder=True).repeat().skip(done)
        return batches.map(lambda batch: (batch, batch))

    def run(folder, **options):
        return stf.experiments.run(
            lambda: small_model(policy, num_blocks=2, dropout=dropout, average=0.9, accumulation_steps=3),
            train,
            lambda shard: train(0).take(1),
            tmp_path / folder,
            steps=12,
            epochs=3,  # of 4 batches: the updates are after batches 3, 6, 9 and 12
            **options,
        )

    whole = run("whole")
    with pytest.raises(StoppedError):
        run("stopped", callbacks=[StopAfter(0)])
    seen.clear()
    resumed = run("stopped", resume=True)
    assert seen == [4, 0]  # the batch that the data go on from, and validation's
    assert "after step 4" in capsys.readouterr().out
    assert int(resumed.optimizer.iterations) == 4 and steps_taken(resumed.optimizer) == 12
    ours, theirs = (made.variables + made.optimizer.variables for made in (resumed, whole))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=b.path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(accumulation_steps=0), "accumulation_steps=0"),
        (dict(accumulation_steps=2.0), "accumulation_steps=2.0"),
        (dict(accumulation_steps=True), "accumulation_steps=True"),
        (dict(global_clipnorm=0.0), "global_clipnorm=0.0"),
        (dict(weight_decay=-0.1), "weight_decay=-0.1"),
        (dict(weight_decay=np.nan), "weight_decay=nan"),
        (dict(beta_2=1.0), "beta_2=1.0"),
        (dict(average=1.0), "average=1.0"),
        (dict(average=-0.1), "average=-0.1"),
    ],
)
def test_refuses_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        optimizer(1e-3, **arguments)
    with pytest.raises(ValueError, match="none for any variable"):
        AdamW().apply([None], [keras.Variable(1.0)])


def averaging(**options):
    model = SparseTransformer(24, (4, 6), [Local(6)], 1, 2, 8, vocab_size=16, seed=1)
    model.compile(stf.training.optimizer(1e-2, average=0.9, **options), stf.training.cross_entropy())
    return model


def test_without_an_update_the_average_is_nobodys_weights():
    """Neither at the end of `fit`, in the midst of an accumulation or with every step skipped, nor in validation."""
    x = np.random.default_rng(0).integers(0, 16, (4, 24)).astype(np.int32)
    accumulating, broken, fresh = averaging(accumulation_steps=4), averaging(), averaging()
    broken.logits.kernel.assign(np.full(broken.logits.kernel.shape, np.nan))
    for model in (accumulating, broken):
        before = model.get_weights()
        model.fit(x, x, batch_size=2, verbose=0)
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
    plain = fresh.evaluate(x, x, verbose=0)
    assert fresh.evaluate(x, x, verbose=0, callbacks=[stf.callbacks.MovingAverage()]) == plain


def test_weights_without_a_gradient_are_their_own_average():
    x = np.random.default_rng(0).integers(0, 16, (4, 24)).astype(np.int32)
    model = averaging()
    model.embedding.trainable = False
    before = model.embedding.get_weights()
    model.fit(x, x, batch_size=2, verbose=0)
    for a, b in zip(model.embedding.get_weights(), before, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    first, second = (keras.Variable(np.full(2, value, "float32")) for value in (1.0, 5.0))
    adam = AdamW(0.1, weight_decay=0.0, average=0.5)
    adam.build([first, second])
    adam.apply([tf.ones([2]), None], [first, second])
    adam.apply([tf.ones([2]), tf.ones([2])], [first, second])
    averages = dict(zip(("first", "second"), (np.array(average) for _, average in adam.averages()), strict=True))
    np.testing.assert_allclose(averages["second"], 0.5 * 5.0 + 0.5 * np.array(second), rtol=1e-6)


def test_constraints_hold_after_an_update():
    weight = keras.Variable(np.full(3, 0.01, "float32"))
    weight.constraint = keras.constraints.NonNeg()
    adam = AdamW(1.0, average=0.5)
    adam.build([weight])
    adam.apply([tf.ones([3])], [weight])
    np.testing.assert_array_equal(weight, np.zeros(3))


def test_weights_in_bfloat16_move():
    weight = keras.Variable(np.ones((2, 2)), dtype="bfloat16")
    adam = AdamW(0.1, weight_decay=0.0)
    adam.build([weight])
    adam.apply([tf.ones([2, 2], tf.bfloat16)], [weight])
    np.testing.assert_allclose(tf.cast(weight.value, tf.float32), np.full((2, 2), 0.9), rtol=1e-2)


@pytest.mark.parametrize("wrap", [lambda adam: adam, stf.training.LossScale])
def test_needs_variables_before_it_is_built(wrap):
    with pytest.raises(ValueError, match="trainable_variables"):
        wrap(AdamW(0.1)).apply([tf.ones([2])])
