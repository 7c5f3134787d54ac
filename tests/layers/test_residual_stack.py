"""SparseResidualStack: the same numbers as its blocks one by one, whatever it keeps and however it is run."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

import stf
from stf.layers import SparseResidualStack
from stf.patterns import Fixed, Local, PerHead, Strided

BATCH, POSITIONS, WIDTH = 2, 13, 8
HEADS, KEY_DIM, VALUE_DIM, FF_DIM = 2, 4, 3, 12
LOCAL, STRIDED = Local(3), Strided(4)
# Blocks, patterns and the period that they have.
CASES = {
    "one block": (1, [LOCAL], 1),
    "period 1": (3, [LOCAL | STRIDED], 1),
    "period 2": (4, [LOCAL, STRIDED], 2),
    "period 2 and a block": (5, [LOCAL, Fixed(4, 1)], 2),
    "period 4 and three": (11, [LOCAL] * 3 + [STRIDED], 4),
    "a period once": (3, [LOCAL, STRIDED, Fixed(4, 1)], 3),
    "patterns of heads": (4, [PerHead([LOCAL, STRIDED]), PerHead([Fixed(4, 1), LOCAL])], 2),
    "the same pattern twice": (4, [STRIDED, STRIDED], 1),
}
RECOMPUTE = [False, "attention", True]
# Three times the largest that was measured (9.6e-6 eagerly, 2.5e-6 compiled), of a tensor's largest element, float32.
ROUNDING = 3e-5


def make(num_blocks=3, patterns=(LOCAL, STRIDED), recompute=False, dropout=0.3, dtype="float32", **arguments):
    stack = SparseResidualStack(
        num_blocks,
        patterns,
        HEADS,
        KEY_DIM,
        VALUE_DIM,
        FF_DIM,
        dropout,
        recompute,
        dtype=dtype,
        **{"seed": 7} | arguments,
    )
    stack.build((None, None, WIDTH))
    return stack


def trained(stack, seed=1):
    """The stack with no weight at 0 or 1."""
    random = np.random.default_rng(seed)
    for weight in stack.trainable_weights:
        weight.assign(weight.numpy() + 0.2 * random.normal(size=weight.shape))
    return stack


def numbers(seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=(BATCH, POSITIONS, WIDTH)), tf.float32)


def by_stack(stack, mode="eager"):
    """Output, gradient of the input, and of each weight by name with an axis of blocks, of one training step."""
    return step_of(stack, mode)()


def step_of(stack, mode):
    stream, upstream = (tf.cast(numbers(seed), stack.compute_dtype) for seed in (0, 1))
    names = ["output", "stream", *(weight.name for weight in stack.trainable_weights)]

    def step(stream, upstream):
        with tf.GradientTape() as tape:
            tape.watch(stream)
            output = stack(stream, training=True)
        values = [weight.value for weight in stack.trainable_weights]
        return output, *tape.gradient(output, [stream, *values], upstream)

    run = {"eager": step, "function": tf.function(step), "jit": tf.function(step, jit_compile=True)}[mode]
    return lambda: dict(zip(names, run(stream, upstream), strict=True))


def by_layers(stack):
    """The same by `SparseResidualBlock`s one after another, differentiated by a tape."""
    seed = tf.cast(stack.seed_generator.state, tf.int32)  # of the stack's next call
    layers = [stack.as_layer(k) for k in range(stack.num_blocks)]
    stream, upstream = (tf.cast(numbers(seed), stack.compute_dtype) for seed in (0, 1))
    with tf.GradientTape() as tape:
        tape.watch(stream)
        output = stream
        for k, layer in enumerate(layers):
            output = layer.residual(output, seed=seed + [k, 0])
    values = [[weight.value for weight in weights_of(layer).values()] for layer in layers]
    stream_grad, grads = tape.gradient(output, [stream, values], upstream)
    found = {"output": output, "stream": stream_grad}
    for column, name in enumerate(weights_of(layers[0])):
        found[name] = tf.stack([of_block[column] for of_block in grads])
    for kind, shape in (("kernel", [stack.num_blocks, WIDTH, -1]), ("bias", [stack.num_blocks, -1])):
        parts = [tf.reshape(found.pop(f"{name}_{kind}"), shape) for name in ("query", "key", "value")]
        found[f"projection_{kind}"] = tf.concat(parts, -1)
    found["attention_output_kernel"] = tf.reshape(found["attention_output_kernel"], [stack.num_blocks, -1, WIDTH])
    return found


def weights_of(layer):
    """A block's weights by the names that the stack gives them."""
    attention = layer.attention
    denses = {
        "query": attention.query_dense,
        "key": attention.key_dense,
        "value": attention.value_dense,
        "attention_output": attention.output_dense,
        "hidden": layer.hidden_dense,
        "output": layer.output_dense,
    }
    weights = {f"{name}_{kind}": getattr(dense, kind) for name, dense in denses.items() for kind in ("kernel", "bias")}
    for name, norm in (("attention_norm", layer.attention_norm), ("feed_forward_norm", layer.feed_forward_norm)):
        weights |= {f"{name}_gamma": norm.gamma, f"{name}_beta": norm.beta}
    return weights


def errors(found, truth):
    """Of each tensor the largest error, as a part of the largest element."""
    assert set(found) == set(truth)
    result = {}
    for name, true in truth.items():
        a, b = (tf.cast(x, tf.float64).numpy() for x in (found[name], true))
        assert a.shape == b.shape and np.isfinite(a).all(), name
        result[name] = np.abs(a - b).max() / np.abs(b).max()
    return result


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(("num_blocks", "patterns", "period"), CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_the_blocks(num_blocks, patterns, period, recompute):
    stack = trained(make(num_blocks, patterns, recompute))
    assert stack.period == period
    for _ in range(2):  # the second step has masks of its own
        expected = by_layers(stack)
        found = errors(by_stack(stack), expected)
        assert max(found.values()) <= ROUNDING, found


@pytest.mark.parametrize(
    ("name", "recompute", "mode"),
    [
        ("period 2 and a block", False, "function"),
        ("period 4 and three", "attention", "function"),
        ("patterns of heads", True, "function"),
        ("period 2 and a block", True, "jit"),
        pytest.param("period 4 and three", "attention", "jit", marks=pytest.mark.slow),
        pytest.param("patterns of heads", False, "jit", marks=pytest.mark.slow),
        ("one block", True, "jit"),
    ],
)
def test_in_graphs_and_compiled_too(name, recompute, mode):
    stack = trained(make(*CASES[name][:2], recompute))
    expected = by_layers(stack)
    found = errors(by_stack(stack, mode), expected)
    assert max(found.values()) <= ROUNDING, found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["function", "jit"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_graphs_and_compiled(name, recompute, mode):
    test_in_graphs_and_compiled_too(name, recompute, mode)


def test_the_comparison_would_see_a_wrong_mask_and_a_wrong_block():
    stack = trained(make())
    expected = by_layers(stack)
    by_stack(stack)
    later = errors(by_stack(stack), expected)  # the next call's masks
    assert min(later.values()) > 1e3 * ROUNDING
    stack.set_block_weights(1, {"query_bias": 2 * stack.get_block_weights(1)["query_bias"]})
    other = make(dropout=0.0)
    other.set_weights(stack.get_weights()[: len(other.get_weights())])
    assert not np.allclose(other(numbers()), trained(make(dropout=0.0))(numbers()), atol=1e-3)


@pytest.mark.parametrize("mode", ["eager", pytest.param("jit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_gradients_in_half_precision_err_no_more_than_autodiff_does(policy, mode):
    """Mean squares of the errors over several draws of the weights, beside those of layers under a tape."""
    stacks = [make(5, recompute=recompute, dtype=policy) for recompute in RECOMPUTE]
    if mode == "jit":
        stacks = stacks[-1:]
    steps = [step_of(stack, mode) for stack in stacks]
    squares = [{} for _ in stacks]
    allowed = {}
    for draw in range(6):
        exact = trained(make(5, seed=draw), draw)
        truth = by_layers(exact)
        for stack, step, sums in zip(stacks, steps, squares, strict=True):
            stack.set_weights(exact.get_weights())
            stack.seed_generator.state.assign(exact.seed_generator.state)
            if stack is stacks[0]:
                add_squared_errors(allowed, by_layers(stack), truth)
            add_squared_errors(sums, step(), truth)
    for stack, sums in zip(stacks, squares, strict=True):
        for name, square in sums.items():
            assert 0 < square <= 4 * allowed[name], (name, (square / allowed[name]) ** 0.5, stack.recompute)


def add_squared_errors(sums, found, truth):
    for name, true in truth.items():
        error = tf.cast(found[name], tf.float64) - tf.cast(true, tf.float64)
        sums[name] = sums.get(name, 0.0) + float(tf.reduce_mean(error**2))


def train_step_nodes(num_blocks):
    """Nodes of a training step's graph, those of the functions that it calls too."""
    model = stf.models.SparseTransformer(
        24, (6, 4), [Local(4), Strided(4)], num_blocks, 2, 64, ff_dim=64, vocab_size=11, dropout=0.1, recompute=True
    )
    model.compile(stf.training.optimizer(1e-3), stf.training.cross_entropy(), metrics=[stf.training.BitsPerDim()])
    x = tf.zeros([2, 24], tf.int32)
    graph = tf.function(lambda: model.train_step((x, x))).get_concrete_function().graph.as_graph_def()
    functions = graph.library.function
    nodes = [node.op for each in (graph.node, *(function.node_def for function in functions)) for node in each]
    return len(model.variables), len(model.optimizer.variables), len(functions), sorted(nodes)


def test_neither_variables_nor_the_graph_of_a_step_grow_with_the_depth():
    # At 16 blocks of width 64, so that no zeros have below 1,000 elements: TensorFlow writes those as another node.
    shallow, deep = train_step_nodes(16), train_step_nodes(64)
    assert shallow == deep
    _, _, functions, nodes = deep
    assert functions >= 4 and nodes.count("MatMul") + nodes.count("BatchMatMulV2") >= 8  # the loops' bodies are there


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outside_training_nothing_is_dropped_and_each_block_is_seen(dropout):
    stack, stream = trained(make(5, dropout=dropout)), numbers()
    streams = list(stack.hidden(stream))
    assert len(streams) == 6
    np.testing.assert_array_equal(streams[0], stream)
    x = stream
    for k in range(5):
        np.testing.assert_allclose(stack.block(k)(x), stack.as_layer(k)(x), rtol=1e-5, atol=1e-5)
        x = stack.as_layer(k)(x)
        np.testing.assert_allclose(streams[k + 1], x, rtol=1e-5, atol=2e-5)
    for training in (False, None):
        np.testing.assert_allclose(stack(stream, training=training), x, rtol=1e-5, atol=2e-5)
    assert np.allclose(stack(stream, training=True), x, atol=1e-3) == (dropout == 0)


def test_the_weights_of_a_block_are_read_set_and_handed_on_as_they_are():
    stack, other = trained(make(4)), make(4, seed=8)
    for index in range(4):
        held = stack.get_block_weights(index)
        assert held["query_kernel"].shape == (WIDTH, HEADS * KEY_DIM)
        assert held["value_bias"].shape == (HEADS * VALUE_DIM,)
        assert sum(value.size for value in held.values()) * 4 == stack.count_params()
        layer = stack.as_layer(index)
        for name, variable in weights_of(layer).items():
            np.testing.assert_array_equal(np.reshape(variable, held[name].shape), held[name])
        other.set_block_weights(index, held)
    for a, b in zip(stack.trainable_weights, other.trainable_weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_setting_some_weights_of_a_block_leaves_all_others():
    stack = trained(make(3))
    before = [stack.get_block_weights(k) for k in range(3)]
    bias = np.arange(HEADS * KEY_DIM, dtype="float32")
    stack.set_block_weights(1, {"key_bias": bias})
    for k in range(3):
        for name, value in stack.get_block_weights(k).items():
            np.testing.assert_array_equal(value, bias if (k, name) == (1, "key_bias") else before[k][name])


def test_copies_are_copies():
    stack = trained(make(2))
    layer, held = stack.as_layer(0), stack.get_block_weights(0)
    layer.hidden_dense.kernel.assign(0 * layer.hidden_dense.kernel.value)
    held["output_bias"] += 1
    assert np.any(stack.get_block_weights(0)["hidden_kernel"])
    assert not np.array_equal(stack.get_block_weights(0)["output_bias"], held["output_bias"])


@pytest.mark.parametrize("seed", [5, None])
def test_kernels_start_each_for_itself_at_the_initializers_size(seed):
    stack = SparseResidualStack(3, [LOCAL], 8, 16, ff_dim=160, seed=seed)
    stack.build((None, None, 128))
    fans = {"query": (128, 128), "key": (128, 128), "value": (128, 128), "attention_output": (128, 128)}
    fans |= {"hidden": (128, 160), "output": (160, 128)}
    drawn = []
    for index in range(3):
        held = stack.get_block_weights(index)
        for name, fan in fans.items():
            kernel = held[f"{name}_kernel"]
            assert kernel.shape == fan
            assert np.std(kernel) == pytest.approx((2 / sum(fan)) ** 0.5, rel=0.03)  # Glorot's
            drawn.append(kernel.ravel()[: 128 * 128])
        assert not np.any(held["hidden_bias"]) and np.all(held["attention_norm_gamma"] == 1)
    correlations = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 5 / 128  # 153 pairs: 5 sigma


def test_a_seed_fixes_all_initial_values():
    first, again, other, free = (make(seed=seed).trainable_weights for seed in (5, 5, 6, None))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for stranger in (other, free):
        for a, b in zip(first, stranger, strict=True):
            assert np.array_equal(a, b) != a.name.endswith("kernel")


def test_a_seed_fixes_initial_biases_and_no_two_are_alike():
    first, again = (make(bias_initializer="normal") for _ in range(2))
    for a, b in zip(first.trainable_weights, again.trainable_weights, strict=True):
        np.testing.assert_array_equal(a, b)
    biases = [first.get_block_weights(k)[f"{name}_bias"] for k in range(3) for name in ("attention_output", "output")]
    assert len({bias.tobytes() for bias in biases}) == 6


@pytest.mark.parametrize("seed", [None, 5])
def test_an_initializers_own_seed_gives_blocks_that_differ(seed):
    initializers = [keras.initializers.RandomNormal(0.0, 0.1, seed=3) for _ in range(2)]
    first, again = (make(seed=seed, kernel_initializer=initializer) for initializer in initializers)
    kernels = []
    for k in range(3):
        held = first.get_block_weights(k)
        kernels += [held["query_kernel"].tobytes(), held["key_kernel"].tobytes()]
        np.testing.assert_array_equal(held["output_kernel"], again.get_block_weights(k)["output_kernel"])
    assert len(set(kernels)) == 6


def test_each_kernel_has_the_initializer_that_was_meant_for_it():
    deviations = {"kernel": 0.1, "attention_output": 1.0, "output": 10.0}
    stack = SparseResidualStack(
        2,
        [LOCAL],
        4,
        16,
        seed=1,
        **{f"{k}_initializer": keras.initializers.RandomNormal(0, v) for k, v in deviations.items()},
    )
    stack.build((None, None, 64))
    for name in ("query", "key", "value", "attention_output", "hidden", "output"):
        kernel = stack.get_block_weights(1)[f"{name}_kernel"]
        assert np.std(kernel) == pytest.approx(deviations.get(name, 0.1), rel=0.06)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(num_blocks=0), "num_blocks.*num_blocks=0"),
        (dict(num_blocks=2.0), "num_blocks.*num_blocks=2.0"),
        (dict(num_blocks=True), "num_blocks.*num_blocks=True"),
        (dict(patterns=[]), r"patterns.*patterns=\[\]"),
        (dict(patterns=[stf.patterns.Blocks(np.ones((3, 2, 2), bool), 8)]), "heads"),
        (dict(num_heads=0), "num_heads.*num_heads=0"),
        (dict(num_heads=2.0), "num_heads.*num_heads=2.0"),
        (dict(key_dim=0), "key_dim.*key_dim=0"),
        (dict(key_dim=4.0), "key_dim.*key_dim=4.0"),
        (dict(value_dim=0), "value_dim.*value_dim=0"),
        (dict(value_dim=3.0), "value_dim.*value_dim=3.0"),
        (dict(ff_dim=0), "ff_dim.*ff_dim=0"),
        (dict(ff_dim=8.0), "ff_dim.*ff_dim=8.0"),
        (dict(dropout=1.0), "dropout.*dropout=1.0"),
        (dict(dropout=-0.1), "dropout.*dropout=-0.1"),
        (dict(dropout=np.nan), "dropout.*dropout=nan"),
        (dict(dropout="0.5"), "dropout.*dropout='0.5'"),
        (dict(dropout=False), "dropout.*dropout=False"),
        (dict(epsilon=0.0), "epsilon.*epsilon=0.0"),
        (dict(epsilon="small"), "epsilon.*epsilon='small'"),
        (dict(seed=1.5), "seed.*seed=1.5"),
        (dict(seed=2**32), "seed.*seed=4294967296"),
        (dict(recompute=2), "recompute.*recompute=2"),
        (dict(recompute=1), "recompute.*recompute=1"),
        (dict(recompute=None), "recompute.*recompute=None"),
        (dict(recompute="all"), "recompute.*recompute='all'"),
    ],
)
def test_refuses_bad_arguments_by_name_and_value(arguments, says):
    with pytest.raises(ValueError, match=says):
        SparseResidualStack(**dict(num_blocks=2, patterns=[LOCAL], num_heads=2, key_dim=4) | arguments)


def test_refuses_blocks_names_and_shapes_that_it_does_not_have():
    stack = make(3)
    for index in (-1, 3):
        for call in (stack.block, stack.get_block_weights, stack.as_layer, lambda k: stack.set_block_weights(k, {})):
            with pytest.raises(ValueError, match=f"index={index}"):
                call(index)
    for weights in ({"projection_kernel": np.zeros([8, 22])}, {"query_kernel": np.zeros([8, 9])}, {"query_bias": 0.0}):
        before = stack.get_weights()
        with pytest.raises(ValueError, match=f"Received: '{next(iter(weights))}'"):
            stack.set_block_weights(0, {"output_bias": np.ones(WIDTH)} | weights)
        for a, b in zip(before, stack.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)  # not even the part that would have fitted


def test_eager_training_keeps_what_recompute_says():
    """Memory that tensors of a training pass hold until the gradient is taken, in tensors of the stream."""
    held = {}
    x = tf.random.stateless_normal([4, 64, 32], [1, 2])
    for recompute in (True, False):
        stack = SparseResidualStack(6, [Local(8)], 2, 16, ff_dim=64, recompute=recompute, seed=1)
        stack(x)
        gc.collect()
        before = [thing for thing in gc.get_objects() if isinstance(thing, tf.Tensor)]  # kept: an id is another's later
        with tf.GradientTape() as tape:
            y = stack(x, training=True)
        gc.collect()
        old = set(map(id, before))
        made = [t for t in gc.get_objects() if isinstance(t, tf.Tensor) and id(t) not in old]
        held[recompute] = sum(np.prod(t.shape) for t in made if t.shape.rank and t.shape[0] == 4) / np.prod(x.shape)
        assert tape.gradient(y, stack.trainable_variables) is not None
    # Kept of a block: its input; or that, attention's output and log-sum-exp, query-key-value, H + a and hidden layer.
    assert held[True] <= 6 + 2
    assert 6 * 8 <= held[False] <= 6 * 9.1 + 2


@pytest.mark.parametrize("power", [1, 2])  # with 1 what comes from above does not depend on the inputs
def test_second_derivatives_are_refused_in_training(power):
    stack = SparseResidualStack(2, [Local(4)], 2, 4, dtype="float64", seed=1)
    x = tf.random.stateless_normal([1, 8, 8], [1, 2], dtype=tf.float64)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = tf.reduce_sum(stack(x, training=True) ** power)
        first = inner.gradient(y, x)
    with pytest.raises(LookupError, match="differentiable once"):
        outer.gradient(first, x)


def test_float64_with_a_dynamic_batch():
    stack = SparseResidualStack(3, [Local(4), Strided(4)], 2, 4, dtype="float64", seed=1)
    x = tf.random.stateless_normal([2, 12, 8], [1, 2], dtype=tf.float64)
    call = tf.function(stack, input_signature=[tf.TensorSpec([None, 12, 8], tf.float64)])
    np.testing.assert_allclose(call(x), stack(x), rtol=1e-12)
