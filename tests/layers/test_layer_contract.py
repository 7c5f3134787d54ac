"""The one contract that every public layer and model keeps, and the three ways of building with it.

Config round trip, symbolic call, eager call, one step of fit, every dtype policy, save and load.
"""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import stf

POSITIONS, WIDTH = 12, 8
PATTERN = stf.patterns.Local(3) | stf.patterns.Strided(4)


def attention(**kwargs):
    return stf.layers.SparseAttention(2, 4, PATTERN, value_dim=3, **kwargs)


def every_argument(dtype=None, **kwargs):
    # Keras itself cannot add a half-precision activity loss to a float32 kernel loss (3.15, Dense too).
    mixed = str(dtype).startswith("mixed")
    return stf.layers.SparseAttention(
        2,
        4,
        stf.patterns.PerHead([PATTERN, stf.patterns.Summary(4, 1)]),
        value_dim=6,
        use_bias=False,
        output_shape=10,
        kernel_initializer="he_normal",
        output_initializer=keras.initializers.RandomNormal(stddev=0.1),
        kernel_regularizer="l2",
        activity_regularizer=None if mixed else "l2",
        kernel_constraint="max_norm",
        seed=5,
        num_key_value_heads=1,
        attention_sink=True,
        rotary=True,
        rotary_base=500.0,
        rotary_scaling=2.0,
        restart=True,
        dtype=dtype,
        **kwargs,
    )


def block(**kwargs):
    return stf.layers.SparseResidualBlock(
        stf.layers.StridedAttention(2, 4, 4, mode="multihead", dtype=kwargs.get("dtype")),
        ff_dim=12,
        dropout=0.5,
        recompute=True,
        seed=1,
        **kwargs,
    )


def stack(**kwargs):
    return stf.layers.SparseResidualStack(
        5,
        [PATTERN, stf.patterns.Fixed(4, 1)],
        2,
        4,
        value_dim=3,
        ff_dim=12,
        dropout=0.5,
        recompute=True,
        attention_output_initializer=keras.initializers.RandomNormal(stddev=0.1),
        output_initializer=keras.initializers.RandomNormal(stddev=0.1),
        seed=1,
        **kwargs,
    )


def model(**kwargs):
    return stf.models.SparseTransformer(
        length=POSITIONS,
        position_shape=(3, 4),
        patterns=[PATTERN, stf.patterns.Fixed(4, 1)],
        num_blocks=2,
        num_heads=2,
        model_dim=WIDTH,
        vocab_size=WIDTH,
        dropout=0.5,
        recompute=True,
        seed=1,
        **kwargs,
    )


SUBJECTS = {
    "SparseAttention": attention,
    "SparseAttention, every argument": every_argument,
    "StridedAttention": lambda **kw: stf.layers.StridedAttention(2, 4, 4, **kw),
    "StridedAttention, local": lambda **kw: stf.layers.StridedAttention(2, 4, 4, "local", **kw),
    "FixedAttention": lambda **kw: stf.layers.FixedAttention(2, 4, 4, 2, **kw),
    "FixedAttention, summary": lambda **kw: stf.layers.FixedAttention(2, 4, 4, 2, "summary", **kw),
    "RotaryEmbedding": lambda **kw: stf.layers.RotaryEmbedding(500.0, **kw),
    "SparseResidualBlock": block,
    "SparseResidualStack": stack,
    "SequenceEmbedding": lambda **kw: stf.layers.SequenceEmbedding(WIDTH, WIDTH, (3, 4), **kw),
    "SparseTransformer": model,
}
subjects = pytest.mark.parametrize("make", SUBJECTS.values(), ids=SUBJECTS)
POLICIES = ["float32", "mixed_bfloat16", "mixed_float16", "float64"]


def takes_tokens(layer):
    return isinstance(layer, stf.layers.SequenceEmbedding | stf.models.SparseTransformer)


def inputs_of(layer, batch=2):
    random = np.random.default_rng(0)
    if takes_tokens(layer):
        return random.integers(0, WIDTH, (batch, POSITIONS)).astype("int32")
    return random.normal(size=(batch, POSITIONS, WIDTH)).astype("float32")


def symbolic(layer):
    if takes_tokens(layer):
        return keras.Input((POSITIONS,), dtype="int32")
    return keras.Input((POSITIONS, WIDTH))


def users_model(layer, kind):
    """A model of the user's own around the layer: tokens or vectors in, one number out."""
    if kind == "sequential":
        # Keras takes the inputs of a layer that comes first to be of its compute dtype: tokens have to be declared.
        first = [symbolic(layer)] if isinstance(layer, stf.models.SparseTransformer) else []
        return keras.Sequential([*first, layer, keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)])
    if kind == "functional":
        inputs = symbolic(layer)
        outputs = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(layer(inputs)))
        return keras.Model(inputs, outputs)

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = layer
            self.pool = keras.layers.GlobalAveragePooling1D()
            self.dense = keras.layers.Dense(1)

        def call(self, inputs, training=None):
            return self.dense(self.pool(self.layer(inputs, training=training)))

    return Subclassed()


@pytest.mark.parametrize("name", [*stf.layers.__all__, *stf.models.__all__])
def test_every_public_class_has_its_contract(name):
    public = getattr(stf.layers, name, None) or getattr(stf.models, name)
    if isinstance(public, type) and issubclass(public, keras.layers.Layer):
        assert name in SUBJECTS
        assert public.__doc__ and "Args:" in public.__doc__
        assert "keras.src" not in open(__import__(public.__module__, fromlist="x").__file__).read()


@subjects
def test_config_round_trip(make):
    layer = make(name="subject", dtype="mixed_bfloat16")
    config = layer.get_config()
    again = type(layer).from_config(config)
    assert again.get_config() == config
    text = json.dumps(keras.saving.serialize_keras_object(layer))
    through_json = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(through_json) is type(layer)
    assert through_json.dtype_policy.name == "mixed_bfloat16"
    assert through_json.get_config() == config
    assert json.dumps(keras.saving.serialize_keras_object(through_json)) == text
    x = inputs_of(layer)
    layer(x), through_json(x)
    random = np.random.default_rng(1)
    weights = [w + 0.3 * random.normal(size=w.shape) if w.dtype.kind == "f" else w for w in layer.get_weights()]
    layer.set_weights(weights)
    through_json.set_weights(weights)
    for training in (False, True):  # with the same dropout, where there is any, by the seed
        takes = {"training": training} if "dropout" in config else {}
        np.testing.assert_array_equal(through_json(x, **takes), layer(x, **takes))


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (stf.layers.StridedAttention, dict(num_heads=2, key_dim=4, stride=4, value_dim=3)),
        (stf.layers.FixedAttention, dict(num_heads=2, key_dim=4, stride=4, summary=2, output_shape=5)),
        (stf.layers.SequenceEmbedding, dict(vocab_size=8, model_dim=8)),
        (stf.layers.SparseResidualBlock, dict(ff_dim=12)),
        (stf.layers.SparseResidualStack, dict(num_blocks=2, num_heads=2, key_dim=4, value_dim=3, ff_dim=12)),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_sizes_and_seeds_may_be_numpys(make, sizes):
    """They make the same layer, and a config that JSON takes."""
    others = {
        stf.layers.SequenceEmbedding: dict(position_shape=np.array([3, 4])),
        stf.layers.SparseResidualBlock: dict(attention=stf.layers.StridedAttention(2, 4, 4, seed=2)),
        stf.layers.SparseResidualStack: dict(patterns=[PATTERN], dropout=np.float32(0.5)),
    }.get(make, {})
    plain = make(**others, **sizes, seed=2**32 - 1, name="subject")
    numpys = make(**others, **{k: np.int64(v) for k, v in sizes.items()}, seed=np.int64(2**32 - 1), name="subject")
    assert json.dumps(numpys.get_config()) == json.dumps(plain.get_config())
    x = inputs_of(plain)
    np.testing.assert_array_equal(numpys(x), plain(x))


@subjects
def test_symbolic_and_eager_call_agree_in_shape_and_dtype(make):
    for policy in POLICIES:
        layer = make(dtype=policy)
        spec = layer(symbolic(layer))
        result = layer(inputs_of(layer))
        assert isinstance(spec, keras.KerasTensor)
        assert spec.shape[1:] == result.shape[1:]
        assert spec.dtype == result.dtype.name
        assert np.isfinite(tf.cast(result, tf.float32)).all()
        assert all(weight.dtype == layer.variable_dtype for weight in layer.trainable_weights)


@subjects
def test_policies_agree(make):
    exact = make(dtype="float64")
    x = inputs_of(exact)
    truth = exact(x).numpy()
    for policy, most in [("float32", 1e-5), ("mixed_float16", 5e-3), ("mixed_bfloat16", 4e-2)]:
        layer = make(dtype=policy)
        layer(x)
        layer.set_weights(exact.get_weights())
        error = np.abs(tf.cast(layer(x), tf.float64) - truth).max()
        assert error <= most * max(1, np.abs(truth).max())


def named_weights(layer):
    """The weights by name, those of a stack block by block, with queries', keys' and values' apart."""
    stack = getattr(layer, "stack", layer)
    if not isinstance(stack, stf.layers.SparseResidualStack):
        return {weight.path: weight.numpy() for weight in layer.weights}
    stacked = {id(weight) for weight in stack.trainable_weights}
    found = {weight.path: weight.numpy() for weight in layer.weights if id(weight) not in stacked}
    for index in range(stack.num_blocks):
        found |= {f"{index}/{name}": value for name, value in stack.get_block_weights(index).items()}
    return found


@subjects
@pytest.mark.parametrize(
    "kind",
    [pytest.param("sequential", marks=pytest.mark.slow), "functional", "subclassed"],
)
def test_fit_in_a_users_model(make, kind):
    for policy in ["float32", "mixed_bfloat16", "mixed_float16"]:
        keras.utils.set_random_seed(0)
        layer = make(dtype=policy)
        users = users_model(layer, kind)
        x = inputs_of(layer, batch=4)
        users(x)
        if isinstance(layer, stf.models.SparseTransformer):
            # W_out starts at 0: at that point nothing below it has a gradient.
            layer.logits.kernel.assign(np.random.default_rng(1).normal(size=layer.logits.kernel.shape))
        before = named_weights(layer)
        users.compile(keras.optimizers.SGD(0.1), "mse")
        history = users.fit(x, np.ones([4, 1]), batch_size=2, epochs=1, verbose=0)
        assert np.isfinite(history.history["loss"]).all()
        # All weights move but the keys' biases, whose gradient is 0: they add one number to all scores of a query,
        # which leaves their softmax as it is. Roundings move those by 1.4e-4 at most (bfloat16), gradients the others
        # by 3e-3 at least.
        after = named_weights(layer)
        rest = {name for name, value in after.items() if np.abs(value - before[name]).max() < 6e-4}
        assert rest == {name for name in after if name.endswith(("/key/bias", "/key_bias"))}


@subjects
def test_fit_compiled_by_xla(make):
    """The same losses, and weights afterwards, as without."""
    losses, weights, start = [], [], None
    for jit in (False, True):
        keras.utils.set_random_seed(0)  # for dropout
        layer = make()
        x = inputs_of(layer, batch=4)
        users = users_model(layer, "functional")
        users(x)
        start = start or users.get_weights()
        users.set_weights(start)
        users.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
        losses.append(users.fit(x, np.ones([4, 1]), batch_size=2, epochs=2, shuffle=False, verbose=0).history["loss"])
        weights.append(users.get_weights())
        assert users.jit_compile == jit
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@subjects
def test_save_and_load(make, tmp_path):
    layer = make()
    inputs = symbolic(layer)
    users = keras.Model(inputs, layer(inputs))
    x = inputs_of(layer)
    users.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), users(x))
    users.export(tmp_path / "saved_model", verbose=False)
    restored = tf.saved_model.load(tmp_path / "saved_model")  # `serve` alone would not keep the variables
    served = restored.serve
    np.testing.assert_allclose(served(x), users(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(served(x[:1]), users(x)[:1], rtol=1e-5, atol=1e-6)
