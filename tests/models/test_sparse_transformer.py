"""SparseTransformer: presets, the shift, the parts' places, refusals. What every layer keeps: tests/layers."""

import ctypes
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import stf
from stf.layers.block import Block
from stf.models import PRESETS, SparseTransformer

PATTERNS = [stf.patterns.Local(4), stf.patterns.Strided(4)]


def make(**arguments):
    defaults = dict(
        length=24,
        position_shape=(6, 4),
        patterns=PATTERNS,
        num_blocks=3,
        num_heads=2,
        model_dim=8,
        vocab_size=11,
        seed=1,
    )
    model = SparseTransformer(**(defaults | arguments))
    model.logits.kernel.assign(np.random.default_rng(0).normal(size=model.logits.kernel.shape))  # it starts at 0
    return model


def tokens(batch=2, positions=24, vocab_size=11, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, positions)).astype("int32")


def test_cifar10_has_the_papers_59_million_parameters():
    model = SparseTransformer.from_preset("cifar10")
    assert model.count_params() == 59_196_928
    assert model.stack.num_blocks == 128 and model.stack.period == 2
    assert [model.stack.pattern(k) for k in range(2)] == [stf.patterns.Local(96), stf.patterns.Strided(96)]
    assert len(model.trainable_variables) == 20  # whatever the depth: 12 of all blocks, 8 around them


def test_presets_are_copies_and_take_other_arguments():
    small = SparseTransformer.from_preset("cifar10-small", num_blocks=1, vocab_size=16)
    assert (small.num_blocks, small.vocab_size) == (1, 16)
    assert PRESETS["cifar10-small"]["num_blocks"] == 2
    with pytest.raises(ValueError, match="preset='cifar100'"):
        SparseTransformer.from_preset("cifar100")


def test_from_preset_of_a_file(tmp_path):
    model = SparseTransformer.from_preset("cifar10-small", num_blocks=1, length=96, position_shape=(4, 8, 3), seed=0)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 96), dtype=np.uint8)
    model.compile(stf.training.optimizer(0.01, average=0.5), stf.training.cross_entropy())
    model.fit(stf.data.batches(tokens, 2, seed=0), steps_per_epoch=3, verbose=0)  # ends with the average as its weights
    path = tmp_path / "model.keras"
    model.save(path)
    again = SparseTransformer.from_preset(path, dropout=0.5, recompute=True)
    assert not again.compiled and again.get_config()["dropout"] == 0.5
    np.testing.assert_array_equal(again(tokens), model(tokens))
    with pytest.raises(ValueError, match="model_dim"):
        SparseTransformer.from_preset(str(path), model_dim=32, num_heads=1)
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "other.keras")
    with pytest.raises(ValueError, match="Sequential"):
        SparseTransformer.from_preset(tmp_path / "other.keras")


def test_from_preset_takes_the_average_of_a_checkpoint(tmp_path):
    model = SparseTransformer.from_preset("cifar10-small", num_blocks=1, length=96, position_shape=(4, 8, 3), seed=0)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 96))
    model.compile(stf.training.optimizer(0.01, average=0.9), stf.training.cross_entropy())
    for _ in range(3):
        model.train_on_batch(tokens, tokens)
    model.save(tmp_path / "checkpoint.keras")
    again = SparseTransformer.from_preset(tmp_path / "checkpoint.keras")
    averages = dict((weight.path, average) for weight, average in stf.training.averages(model.optimizer))
    for weight, mine in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(mine, averages.get(weight.path, weight))
    assert any(np.any(np.asarray(mine) != np.asarray(w)) for w, mine in zip(model.weights, again.weights, strict=True))


def test_first_loss_is_that_of_the_uniform_distribution():
    model = SparseTransformer.from_preset("cifar10-small", length=30)
    x = tokens(positions=30, vocab_size=256)
    loss = stf.training.cross_entropy()(x, model(x))
    assert float(loss) == pytest.approx(np.log(256), rel=1e-6)


def test_no_logit_sees_its_own_token_or_a_later_one():
    model, x = make(), tokens()
    before = model(x).numpy()
    for t in (0, 7, 23):
        changed = x.copy()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = model(changed).numpy()
        np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
        if t < 23:
            assert not np.array_equal(after[:, t + 1], before[:, t + 1])


def test_interleaved_heads_reach_every_earlier_token_in_two_blocks():
    """p = 2 hops (Section 4.2): with one local and one strided block any token reaches any later position."""
    model = make(num_blocks=2)
    hidden = tf.Variable(tf.random.stateless_normal([1, 24, 8], [1, 2]))
    with tf.GradientTape() as tape:
        last = tf.reduce_sum(model.stack(hidden)[:, -1] ** 2)
    assert np.all(np.abs(tape.gradient(last, hidden).numpy()).max(-1) > 0)


def test_shorter_sequences_and_dynamic_shapes():
    model, x = make(), tokens()
    whole = model(x).numpy()
    call = tf.function(model, input_signature=[tf.TensorSpec([None, None], tf.int32)])
    for positions in (1, 5, 23):
        for function in (model, call):
            np.testing.assert_allclose(function(x[:, :positions]), whole[:, :positions], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="length=24"):
        model(tokens(positions=25))


def test_w_p_and_w_2_start_smaller_by_the_root_of_twice_the_depth():
    model = make(num_blocks=8, model_dim=64)
    kinds = {"hidden": (64, 1), "output": (256, 4), "query": (64, 1), "attention_output": (64, 4)}
    for index in (0, 7):
        weights = model.stack.get_block_weights(index)
        for name, (fan_in, smaller) in kinds.items():
            assert np.std(weights[f"{name}_kernel"]) * smaller == pytest.approx((0.125 / fan_in) ** 0.5, rel=0.05)


def test_seed_fixes_all_weights_and_makes_no_two_blocks_alike():
    first, second, other = make(), make(), make(seed=2)
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    kernels = [first.stack.get_block_weights(k)["query_kernel"] for k in range(3)]
    kernels.append(other.stack.get_block_weights(0)["query_kernel"])
    assert len({kernel.tobytes() for kernel in kernels}) == 4


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    "recompute", [pytest.param(False, marks=pytest.mark.slow), pytest.param("attention", marks=pytest.mark.slow), True]
)
def test_fit_learns_a_repeated_sequence(policy, recompute):
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(1)
        model = make(recompute=recompute, dropout=0.01)
        x = np.tile(tokens(batch=1), (4, 1))
        model.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy(), metrics=[stf.training.BitsPerDim()])
        history = model.fit(x, x, epochs=25, batch_size=4, verbose=0).history
    finally:
        keras.config.set_dtype_policy("float32")
    assert history["bits_per_dim"][-1] < 0.5 * history["bits_per_dim"][0]
    np.testing.assert_allclose(history["bits_per_dim"], np.array(history["loss"]) / np.log(2), rtol=1e-3)


@pytest.mark.parametrize(
    "recompute",
    [pytest.param(False, marks=pytest.mark.slow), pytest.param("attention", marks=pytest.mark.slow), True],
)
def test_fit_compiled_by_xla_gives_the_same_losses(recompute):
    """Dropout's masks are the same too."""
    x = np.tile(tokens(batch=1), (4, 1))
    losses = []
    for jit in (False, True):
        keras.utils.set_random_seed(1)
        model = make(recompute=recompute, dropout=0.1)
        model.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy(), jit_compile=jit)
        losses.append(model.fit(x, x, epochs=8, batch_size=4, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_trained_model_is_saved_with_its_optimizer(tmp_path):
    model, x = make(), tokens(batch=4)
    model.compile(stf.training.optimizer(1e-3), stf.training.cross_entropy())
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(x), model(x))
    for either in (model, again):
        either.fit(x, x, verbose=0)
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_steps_do_not_wait_for_the_device(steps_per_execution):
    model = make()
    model.compile("sgd", stf.training.cross_entropy(), steps_per_execution=steps_per_execution)
    whole, part = tokens(4), tokens(3)
    batches = tf.data.Dataset.from_generator(
        lambda: ((x, x) for x in (whole, part)), output_signature=(tf.TensorSpec([None, None], tf.int32),) * 2
    )
    history = model.fit(batches, epochs=2, verbose=0).history["loss"]
    assert history[1] < history[0] and int(model.optimizer.iterations) == 4
    assert np.isfinite(model.evaluate(batches, verbose=0))
    iterator = iter(batches)
    losses = []
    with pytest.raises(StopIteration):
        while True:
            losses.append(float(model.train_function(iterator)["loss"]))
    assert len(losses) == 2 / steps_per_execution


def test_attention_weights_are_those_of_the_blocks():
    model, x = make(), tokens()
    weights = model.attention_weights(x, [3, 20], blocks=[1])
    hidden = list(model.stack.hidden(model.embedding(x)))[1]
    block = model.stack.as_layer(1)
    _, scores = block.attention(block.attention_norm(hidden), return_attention_scores=True)
    for head in range(2):
        for position, (keys, of_keys) in zip([3, 20], weights[0][head], strict=True):
            np.testing.assert_allclose(of_keys, scores.numpy()[:, head, position][:, keys], rtol=1e-4, atol=1e-6)


def bytes_in_use():
    """What the process has of malloc, TensorFlow's tensors on the CPU among it; not what malloc keeps for later."""

    class Counts(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks".split()]
        _fields_ += [(name, ctypes.c_size_t) for name in "fsmblks uordblks fordblks keepcost".split()]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Counts
    counts = mallinfo()
    return counts.uordblks + counts.hblkhd


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_eager_calls_keep_no_blocks_output(monkeypatch):
    length, width, depth = 2048, 128, 12
    model = SparseTransformer(length, (32, 64), [stf.patterns.Local(8)], depth, 2, width, vocab_size=8, seed=1)
    x, held = tokens(1, length, 8), []  # as each block begins, in tensors of the residual stream
    project = Block.query_key_value

    def spy(block, stream):
        held.append(bytes_in_use() / (length * width * 4))
        return project(block, stream)

    monkeypatch.setattr(Block, "query_key_value", spy)
    for call in (model, lambda x: model.attention_weights(x, [5])):
        held.clear()
        call(x)
        assert len(held) >= depth
        assert max(held[1:]) - held[1] < 1  # kept, ten blocks' outputs would be 10


@pytest.mark.parametrize("fitted", [False, True], ids=["right after construction", "after fit"])
def test_export_serves_integer_tokens(fitted, tmp_path):
    model, x = make(), tokens()
    if fitted:
        model.compile(stf.training.optimizer(1e-2), stf.training.cross_entropy())
        model.fit(x, x, verbose=0)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    _, signature = served.signatures["serving_default"].structured_input_signature
    [spec] = signature.values()
    assert spec.dtype == tf.int32 and spec.shape.as_list() == [None, None]
    for positions in (24, 7):
        np.testing.assert_allclose(served.serve(x[:, :positions]), model(x[:, :positions]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bool"])
def test_tokens_that_are_not_integers_are_refused(dtype):
    model, x = make(), tokens()
    with pytest.raises(ValueError, match=f"integer tokens.*dtype {dtype}"):
        model(x.astype(dtype))
    for integers in ("uint8", "int64"):
        np.testing.assert_array_equal(model(x.astype(integers)), model(x))


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("float32", "float32"), ("mixed_bfloat16", "float32"), ("mixed_float16", "float32"), ("float64", "float64")],
)
def test_logits_are_not_rounded_to_half_precision(policy, dtype):
    logits = make(dtype=policy)(tokens())
    assert logits.dtype == dtype
    rounded = tf.cast(tf.cast(logits, tf.bfloat16), logits.dtype)
    assert np.mean(logits.numpy() == rounded.numpy()) < 0.05


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(length=0), "length.*length=0"),
        (dict(length=24.0), "length.*length=24.0"),
        (dict(num_blocks=0), "num_blocks.*num_blocks=0"),
        (dict(num_blocks="3"), "num_blocks.*num_blocks='3'"),
        (dict(num_blocks=True), "num_blocks.*num_blocks=True"),
        (dict(position_shape=(5, 4)), r"position_shape=\(5, 4\)"),
        (dict(position_shape=24), "position_shape.*position_shape=24"),
        (dict(position_shape=(6.0, 4)), "position_shape.*position_shape=6.0"),
        (dict(position_shape=("6", 4)), "position_shape.*position_shape='6'"),
        (dict(position_shape=()), r"position_shape.*position_shape=\(\)"),
        (dict(seed="1"), "seed.*seed='1'"),
        (dict(seed=1.5), "seed.*seed=1.5"),
        (dict(seed=2**32), "seed.*seed=4294967296"),
        (dict(num_heads=3), "num_heads=3"),
        (dict(num_heads=0), "num_heads.*num_heads=0"),
        (dict(num_heads=2.0), "num_heads.*num_heads=2.0"),
        (dict(model_dim=0), "model_dim.*model_dim=0"),
        (dict(model_dim=8.0), "model_dim.*model_dim=8.0"),
        (dict(key_dim=0), "key_dim.*key_dim=0"),
        (dict(key_dim="4"), "key_dim.*key_dim='4'"),
        (dict(value_dim=0), "value_dim.*value_dim=0"),
        (dict(value_dim=-1), "value_dim.*value_dim=-1"),
        (dict(ff_dim=0), "ff_dim.*ff_dim=0"),
        (dict(ff_dim=16.0), "ff_dim.*ff_dim=16.0"),
        (dict(vocab_size=0), "vocab_size.*vocab_size=0"),
        (dict(vocab_size=11.0), "vocab_size.*vocab_size=11.0"),
        (dict(patterns=[]), r"patterns=\[\]"),
        (dict(init="other"), "^init must.*init='other'"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(dropout="0.5"), "dropout='0.5'"),
        (dict(recompute=2), "recompute=2"),
        (dict(recompute="all"), "recompute='all'"),
    ],
)
def test_refuses_bad_arguments_by_their_own_names(arguments, says):
    with pytest.raises(ValueError, match=says):
        make(**arguments)


@pytest.mark.parametrize("name", ["key_dim", "value_dim", "ff_dim"])
def test_a_width_that_is_given_is_not_taken_for_the_default(name):
    assert getattr(make(**{name: 3}), name) == 3


def test_sizes_may_be_numpys(tmp_path):
    sizes = dict(length=24, num_blocks=2, num_heads=2, model_dim=8, key_dim=3, value_dim=5, ff_dim=7, vocab_size=11)
    model = make(position_shape=tuple(np.array([6, 4])), **{name: np.int64(size) for name, size in sizes.items()})
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert {name: loaded.get_config()[name] for name in sizes} == sizes
    np.testing.assert_array_equal(loaded(tokens()), model(tokens()))


def test_conditions_are_told_saved_and_counted(tmp_path):
    model = make(conditions=(3, 2))
    x = tokens(4)
    told = np.array([[0, 0], [1, 0], [2, 1], [2, 0]], "int32")
    logits = model((x, told)).numpy()
    np.testing.assert_array_equal(model(x).numpy()[0], logits[0])  # all 0 unless given
    for row in range(1, 4):  # at every position, the first too
        assert np.abs(logits[row] - model(x).numpy()[row]).max(-1).min() > 1e-3
    model.save(tmp_path / "told.keras")
    again = keras.saving.load_model(tmp_path / "told.keras")
    assert again.conditions == (3, 2)
    np.testing.assert_array_equal(again((x, told)), logits)
    config = model.get_config() | {"vocab_size": 11}
    assert stf.models.presets.count_parameters(config, 11) == model.count_params()
    assert make().count_params() == model.count_params() - 5 * 8


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_told_model_learns_what_its_conditions_say(jit_compile):
    """Two classes of sequences, each one token repeated: only the class says the first token."""
    keras.utils.set_random_seed(0)
    model = make(conditions=(2,), num_blocks=1)
    labels = np.arange(64).reshape(-1, 1) % 2
    x = np.repeat(np.where(labels == 0, 3, 7), 24, axis=1).astype("int32")
    model.compile(stf.training.optimizer(0.02), stf.training.cross_entropy(), jit_compile=jit_compile)
    model.fit((x, labels.astype("int32")), x, batch_size=16, epochs=6, verbose=0)
    assert np.exp(-model.compute_loss(y=x, y_pred=model((x, labels)))) > 0.8
    for label, token in enumerate((3, 7)):
        drawn = model.generate(2, temperature=0, conditions=[label], verbose=0)
        np.testing.assert_array_equal(drawn, np.full((2, 24), token))
    both = model.generate(temperature=0, prefix=x[:2, :5], conditions=labels[:2], verbose=0)
    np.testing.assert_array_equal(both, x[:2])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: model((tokens(), tokens(), tokens())), "3 inputs"),
        (lambda model: make()((tokens(), np.zeros((2, 1), "int32"))), r"conditions=\(\)"),
        (lambda model: model((tokens(), np.zeros((2, 1), "int32"))), r"shape \(2, 1\)"),
        (lambda model: model((tokens(), np.zeros((2, 2), "float32"))), "float32"),
        (lambda model: model.generate(conditions=[3, 0]), r"conditions=\[3, 0\]"),
        (lambda model: model.generate(conditions=[0.5, 0]), r"conditions=\[0.5, 0\]"),
        (lambda model: make().generate(conditions=[0]), r"conditions=\[0\]"),
        (lambda model: make(conditions=(0,)), "conditions"),
        (lambda model: make(conditions=3), "conditions=3"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(make(conditions=(3, 2)))


def test_data_sets_are_fitted_without_a_warning():
    model, data = make(), stf.data.batches(np.zeros((8, 24), np.uint8), 4, seed=0)
    model.compile(stf.training.optimizer(0.02), stf.training.cross_entropy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(data, steps_per_epoch=2, verbose=0)


def test_features_are_the_mean_of_a_blocks_normalized_output():
    model, x = make(), tokens(5)
    streams = [np.asarray(stream) for stream in model.stack.hidden(model.embedding(x))]
    for block, stream in enumerate(streams[1:]):
        normalized = (stream - stream.mean(-1, keepdims=True)) / np.sqrt(stream.var(-1, keepdims=True) + 1e-5)
        found = model.features(x, np.int64(block), batch_size=2)
        np.testing.assert_allclose(found, normalized.mean(1), atol=1e-5)
    np.testing.assert_array_equal(model.features(x), model.features(x, 1))  # of three blocks
    for wrong in ({"block": 3}, {"block": 0.5}, {"block": -1}, {"tokens": x[0]}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="Received"):
            model.features(**({"tokens": x} | wrong))
