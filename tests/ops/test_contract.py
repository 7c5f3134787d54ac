"""The op's contract beside its numbers: the same bits, graphs and SavedModels, refusals."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import stf
from ops.cases import HEADS, NAMES, case, run
from ops.float64_reference import DTYPES, random_inputs

TESTS = pathlib.Path(__file__).parents[1]
PATTERN = stf.patterns.Local(5) | stf.patterns.Strided(5)

# What /proc/cpuinfo calls the features that the kernels of each instruction set need; the best comes first.
FEATURES = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
    "generic": set(),
}

DIGEST = """
import ctypes, hashlib, sys
sys.path.insert(0, {tests!r})
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads({threads})
import stf
from ops.cases import HEADS, NAMES, case, check, run
from ops.float64_reference import DTYPES, random_inputs
digest = hashlib.sha256()
for name in NAMES:
    for dtype in DTYPES:
        for batch in (1, 5):  # few long sequences, many short ones
            inputs = random_inputs(3, batch, 149, HEADS, 12, 20, dtype, lengths=[149, 3, 0, 90, 148][:batch])
            go = check if {checked} else lambda inputs, pattern, mask: run(inputs, pattern)
            for x in go(inputs, *case(name, 7, 149)):
                digest.update(x.tobytes())
# Backward's tiles add to the same keys in turn. Here a block ends within a tile, so that the segments of one tile begin
# and end within those of another, and a turn that comes too early changes the order of a sum.
for pattern, n in ((stf.patterns.Fixed(100, 30), 700), (stf.patterns.Fixed(300, 8), 2300)):
    inputs = random_inputs(3, 1, n, 1, 12, 20)
    for _ in range({repeats}):
        for x in run(inputs, pattern):
            digest.update(x.tobytes())
isa = ctypes.CDLL(stf.ops.library.kernels_path()).stf_attention_cpu_isa
isa.restype = ctypes.c_char_p
print(isa().decode(), digest.hexdigest())
"""


def available():
    """The instruction sets of FEATURES that this processor has."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())
    return [isa for isa, features in FEATURES.items() if features <= flags]


def digest(threads=2, checked=False, isa=None, repeats=1):
    """A hash of all outputs and gradients, by a process of its own, which ran the instruction set that was asked for.

    Args:
        threads: of TensorFlow's pool.
        checked: whether results are also held against float64.
        isa: an instruction set; the processor's best unless given.
        repeats: runs of the patterns whose backward tiles wait for one another within segments.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_NUM_")}
    environment.pop("STF_CPU_ISA", None)
    if isa:
        environment["STF_CPU_ISA"] = isa
    program = DIGEST.format(tests=str(TESTS), threads=threads, checked=checked, repeats=repeats)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran, found = done.stdout.split()[-2:]
    assert ran == (isa or available()[0])
    return found


def test_same_bits_with_one_two_and_eight_threads():
    one, two, eight = (digest(threads=threads, repeats=30) for threads in (1, 2, 8))
    assert one == two == eight


@pytest.mark.parametrize("isa", FEATURES)
def test_every_instruction_set_is_right(isa):
    if isa not in available():
        pytest.skip(f"this processor has no {isa}")
    digest(checked=True, isa=isa)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_every_time(name):
    inputs = random_inputs(11, 3, 157, HEADS, 24, 16, lengths=[157, 20, 0])
    first = run(inputs, case(name, 9, 157)[0])
    for _ in range(5):
        for a, b in zip(run(inputs, case(name, 9, 157)[0]), first, strict=True):
            np.testing.assert_array_equal(a, b)


def test_one_graph_serves_every_length_and_batch():
    @tf.function(input_signature=[tf.TensorSpec([None, None, 2, 8])] * 3 + [tf.TensorSpec([None], tf.int32)])
    def step(query, key, value, lengths):
        with tf.GradientTape() as tape:
            tape.watch(query)
            output = stf.ops.attention(query, key, value, PATTERN, lengths=lengths)
        return output, tape.gradient(output, query)

    for batch, n in ((1, 1), (3, 17), (2, 64), (0, 5), (2, 0)):
        q, k, v = random_inputs(n, batch, n, 2, 8, 8)[:3]
        got, grad = step(q, k, v, np.full(batch, n, "int32"))
        np.testing.assert_array_equal(got, stf.ops.attention(q, k, v, PATTERN))
        assert grad.shape == q.shape


def test_shapes_are_inferred_from_one_another():
    specs = [tf.TensorSpec([None, 7, 2, 4]), tf.TensorSpec([3, None, 2, None]), tf.TensorSpec([None, None, None, 5])]

    @tf.function(input_signature=specs)
    def call(query, key, value):
        output, log_sum_exp = stf.ops.attention(query, key, value, PATTERN, return_log_sum_exp=True)
        assert output.shape == (3, 7, 2, 5) and log_sum_exp.shape == (3, 2, 7)
        return output

    call.get_concrete_function()


def test_saved_model(tmp_path):
    module = tf.Module()
    signature = [tf.TensorSpec([None, None, 2, 8])] * 3
    module.call = tf.function(lambda q, k, v: stf.ops.attention(q, k, v, PATTERN), input_signature=signature)
    tf.saved_model.save(module, tmp_path)
    q, k, v = random_inputs(1, 2, 30, 2, 8, 8)[:3]
    again = tf.saved_model.load(tmp_path)
    np.testing.assert_array_equal(again.call(q, k, v), stf.ops.attention(q, k, v, PATTERN))


def test_recompute_grad():
    q, k, v = (tf.constant(x) for x in random_inputs(1, 2, 30, 2, 8, 8)[:3])

    def call(q, k, v):
        return stf.ops.attention(q, k, v, PATTERN)

    plain, again = [], []
    for function, to in ((call, plain), (tf.recompute_grad(call), again)):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            output = function(q, k, v) ** 2
        to.extend(tape.gradient(output, [q, k, v]))
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradient_of_one_output_alone():
    q, k, v = (tf.constant(x) for x in random_inputs(1, 1, 30, 2, 8, 8)[:3])
    for index in range(2):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([q, v])
            ours = stf.ops.attention(q, k, v, PATTERN, return_log_sum_exp=True)[index]
            dense = stf.ops.reference_attention(q, k, v, PATTERN, return_log_sum_exp=True)[index]
        np.testing.assert_allclose(tape.gradient(ours, q), tape.gradient(dense, q), atol=1e-5)
    assert not np.any(tape.gradient(ours, v))  # the log-sum-exp does not depend on the values


def test_second_derivatives_say_what_to_use():
    q = tf.random.stateless_normal([1, 6, 1, 4], [1, 2])
    with tf.GradientTape() as outer:
        outer.watch(q)
        with tf.GradientTape() as inner:
            inner.watch(q)
            output = stf.ops.attention(q, q, q, PATTERN)
        grad = inner.gradient(output, q)
    with pytest.raises(LookupError, match="reference_attention"):
        outer.gradient(grad, q)


def test_no_nan_from_rows_that_attend_to_nothing_in_any_dtype():
    for dtype in DTYPES:
        inputs = random_inputs(1, 2, 40, HEADS, 8, 8, dtype, lengths=[40, 0])
        results = run(inputs, case("no_blocks", 6, 40)[0])
        assert not np.any(results.output) and np.all(np.isneginf(results.log_sum_exp))
        assert not any(np.any(x) for x in results[2:])


def test_padding_may_hold_anything():
    """NaN and infinity after a sequence's length reach neither outputs nor gradients."""
    inputs = random_inputs(4, 2, 50, HEADS, 8, 8, lengths=[20, 33])
    spoilt = [x.copy() for x in inputs[:3]]
    for x in spoilt:
        x[0, 20:], x[1, 33:] = np.nan, np.inf
    for name in NAMES:
        clean = run(inputs, case(name, 6, 50)[0])
        dirty = run(inputs._replace(query=spoilt[0], key=spoilt[1], value=spoilt[2]), case(name, 6, 50)[0])
        for a, b in zip(clean, dirty, strict=True):
            np.testing.assert_array_equal(a, b)


X = np.zeros((2, 6, 2, 4), "float32")
REFUSALS = [
    (dict(query=None), "query=None"),
    (dict(query=X[0]), "query=<float32 of shape"),
    (dict(query=X.astype("int32")), "query=<int32 of shape"),
    (dict(key=X[:, :5]), "key=<float32 of shape"),
    (dict(key=X.astype("float16")), "key=<float16 of shape"),
    (dict(value=X[:1]), "value=<float32 of shape"),
    (dict(value=X[..., None]), "value=<float32 of shape"),
    (dict(pattern="causal"), "pattern='causal'"),
    (dict(pattern=stf.patterns.Blocks(np.ones((3, 2, 2), bool), 3)), "heads|num_heads"),
    (dict(pattern=stf.patterns.Blocks(np.ones((3, 3), bool), 3)), "positions|blocks"),
    (dict(lengths=[6]), "lengths="),
    (dict(lengths=[6.0, 6.0]), "lengths="),
    (dict(lengths=[None, 6]), r"lengths must be integers.*lengths=\[None, 6\]"),
    (dict(lengths=["6", "6"]), r"lengths must be integers.*lengths=\['6', '6'\]"),
    (dict(lengths=[2**70, 6]), "lengths must be integers.*lengths="),
    (dict(scale=np.inf), "scale=inf"),
    (dict(scale="1"), None),
]


@pytest.mark.parametrize(
    ("arguments", "says"), REFUSALS, ids=[str(list(a)) + str(i) for i, (a, _) in enumerate(REFUSALS)]
)
def test_refuses_bad_arguments_by_name_and_value(arguments, says):
    call = dict(query=X, key=X, value=X, pattern=PATTERN) | arguments
    if says is None:  # a string that is a number is one
        assert stf.ops.attention(**call).shape == X.shape
        return
    with pytest.raises(ValueError, match=says):
        stf.ops.attention(**call)


@pytest.mark.parametrize("lengths", [[7, 1], [-1, 1], [2**40, 0]])
def test_refuses_lengths_that_do_not_fit_when_it_runs(lengths):
    with pytest.raises(tf.errors.InvalidArgumentError, match="lengths"):
        stf.ops.attention(X, X, X, PATTERN, lengths=tf.constant(lengths))
    with pytest.raises(ValueError, match=rf"lengths\[0\]={lengths[0]}"):  # no need to run where it is known before
        stf.ops.attention(X, X, X, PATTERN, lengths=np.array(lengths))


def test_dynamic_shapes_that_do_not_fit_are_refused_when_it_runs():
    spec = tf.TensorSpec([None, None, 2, 4])
    call = tf.function(lambda q, k: stf.ops.attention(q, k, k, PATTERN), input_signature=[spec, spec])
    with pytest.raises(tf.errors.InvalidArgumentError, match="key must have shape"):
        call(X, X[:, :5])
    layout = stf.patterns.Blocks(np.ones((3, 3), bool), 2)
    call = tf.function(lambda q: stf.ops.attention(q, q, q, layout | stf.patterns.Local(1)), input_signature=[spec])
    assert call(X).shape == X.shape


NUMBERS = st.one_of(st.integers(-2, 70), st.sampled_from([-(2**63), 2**31, 2**40, 2**62, 2**63 - 1]))


@given(
    components=st.lists(NUMBERS, max_size=14),
    program_begin=st.lists(NUMBERS, max_size=4),
    layouts=st.lists(st.binary(max_size=9), max_size=2),
    scale=st.floats(width=32),
    lengths=st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3), max_size=2),
    documents=st.lists(st.one_of(st.integers(-3, 12), st.sampled_from([-(2**31), 2**31 - 1])), max_size=8),
    sinks=st.lists(st.floats(-9, 9, width=32), max_size=3),
    sum_grads=st.integers(0, 2),
    attribute_format=st.sampled_from([2, 2, 2, 1, 0, 3, -(2**40)]),
    n=st.integers(0, 9),
    gradient=st.booleans(),
)
def test_the_raw_op_refuses_or_computes_whatever_it_is_given(
    components, program_begin, layouts, scale, lengths, documents, sinks, sum_grads, attribute_format, n, gradient
):
    """No attribute, no length and no document may abort the process or read outside a tensor."""
    x = tf.ones([2, n, 2, 4])
    call = dict(
        lengths=[tf.constant(given, tf.int32) for given in lengths],
        layout_bits=[tf.constant(np.frombuffer(given, np.uint8)) for given in layouts],
        components=components,
        program_begin=program_begin,
        scale=scale,
        format=attribute_format,
        # Whatever the numbers are: they need not be documents.
        documents=[tf.constant(np.resize(documents, [2, n, 2]), tf.int32)] if documents else [],
    )
    sinks = [tf.constant(sinks)] if sinks else []
    library = stf.ops.library.load()
    try:
        output, log_sum_exp = library.stf_attention(query=x, key=x, value=x, sinks=sinks, **call)
        assert output.shape == x.shape and np.isfinite(output).all()
        if gradient:
            grads = library.stf_attention_grad(
                query=x,
                key=x,
                value=x,
                output=output,
                log_sum_exp=log_sum_exp,
                output_grad=x,
                log_sum_exp_grad=[tf.zeros_like(log_sum_exp)] * sum_grads,
                **call,
            )
            assert all(grad.shape == x.shape for grad in grads)
    except tf.errors.InvalidArgumentError as error:
        assert "Received" in error.message


KINDS = {"causal": 0, "local": 1, "strided": 2, "own block": 3, "summary": 4, "blocks": 5, "columns": 6}


@given(
    kind=st.sampled_from(list(KINDS.values())),
    parameters=st.lists(st.one_of(st.integers(0, 40), st.sampled_from([2**31, 2**50])), min_size=4, max_size=4),
    n=st.integers(1, 150),
    first=st.one_of(st.none(), st.lists(st.integers(-9, 80), min_size=1, max_size=9)),
)
def test_the_raw_op_takes_any_parameters_of_a_component(kind, parameters, n, first):
    x = tf.random.stateless_normal([1, n, 1, 4], [1, 2])
    try:
        output, _ = stf.ops.library.load().stf_attention(
            query=x,
            key=x,
            value=x,
            lengths=[],
            layout_bits=[tf.fill([32], tf.constant(255, tf.uint8))],
            components=[kind, *parameters, 0],
            program_begin=[0, 1],
            scale=0.5,
            format=2,
            documents=[] if first is None else [tf.constant(np.resize(first, [1, n, 2]), tf.int32)],
            sinks=[],
        )
        assert np.isfinite(output).all()
    except tf.errors.InvalidArgumentError as error:
        assert "Received" in error.message
