"""What a graph says to the op: optional inputs, block layouts, and graphs of other formats."""

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.framework import graph_pb2

import stf
from ops.float64_reference import random_inputs
from stf.ops.program import FORMAT

N = 30
NODES = ("StfAttention", "StfAttentionGrad")
PATTERN = stf.patterns.Local(5) | stf.patterns.Strided(5)
LAYOUT = np.tril(np.random.default_rng(0).random((N, N)) < 0.5)  # 113 bytes of bits
LARGE = stf.patterns.Blocks(np.tril(np.random.default_rng(0).random((60, 60)) < 0.5), 1)  # 450 bytes: captured

# As format 1 had it: lengths are an input that is always there, block layouts an attribute.
FORMAT_1 = """
    node {{ name: "x" op: "Placeholder" attr {{ key: "dtype" value {{ type: DT_FLOAT }} }} }}
    node {{ name: "lengths" op: "Placeholder" attr {{ key: "dtype" value {{ type: DT_INT32 }} }} }}
    node {{ name: "forward" op: "StfAttention" input: ["x", "x", "x", "lengths"] {attributes} }}
    node {{ name: "zeros" op: "ZerosLike" input: "forward:1" attr {{ key: "T" value {{ type: DT_FLOAT }} }} }}
    node {{
      name: "backward" op: "StfAttentionGrad" {attributes}
      input: ["x", "x", "x", "lengths", "forward", "forward:1", "x", "zeros"]
    }}
    versions {{ producer: 2000 }}
"""
ATTRIBUTES = """
    attr {{ key: "T" value {{ type: DT_FLOAT }} }}
    attr {{ key: "components" value {{ list {{ i: [{components}] }} }} }}
    attr {{ key: "program_begin" value {{ list {{ i: [{begin}] }} }} }}
    attr {{ key: "layouts" value {{ s: "{layouts}" }} }}
    attr {{ key: "scale" value {{ f: 0.35 }} }}
"""


def joined(numbers):
    return ", ".join(map(str, numbers))


def graph_of_format_1(pattern, more="", layouts=""):
    program = stf.patterns.lower(pattern, 2)
    attributes = ATTRIBUTES.format(
        components=joined(program.components), begin=joined(program.program_begin), layouts=layouts
    )
    return text_format.Parse(FORMAT_1.format(attributes=attributes + more), graph_pb2.GraphDef())


@pytest.mark.parametrize("lengths", [None, [30, 17]])
def test_graphs_of_format_1_are_read(lengths):
    x = random_inputs(1, 2, N, 2, 8, 8).query
    given = [] if lengths is None else lengths
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(graph_of_format_1(PATTERN), name="")
        with tf.compat.v1.Session(graph=graph) as session:
            got = session.run(["forward:0", "backward:0", "backward:1", "backward:2"], {"x:0": x, "lengths:0": given})
    q, k, v = (tf.constant(x) for _ in range(3))
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        output = stf.ops.attention(q, k, v, PATTERN, scale=0.35, lengths=lengths)
    for a, b in zip(got, [output, *tape.gradient(output, [q, k, v], x)], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("pattern", "more", "layouts", "says"),
    [
        (PATTERN, f'attr {{ key: "format" value {{ i: {FORMAT + 1} }} }}', "", f"format=({FORMAT + 1})"),
        (PATTERN, 'attr { key: "format" value { i: 0 } }', "", "format=0"),
        (stf.patterns.Blocks(LAYOUT, 1), "", r"\\377" * 113, "layouts of 113 bytes"),
    ],
)
def test_what_is_not_read_is_refused_by_name(pattern, more, layouts, says):
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(graph_of_format_1(pattern, more, layouts.replace(r"\\", "\\")), name="")
        with tf.compat.v1.Session(graph=graph) as session:
            feed = {"x:0": np.zeros((2, N, 2, 8)), "lengths:0": []}
            with pytest.raises(tf.errors.InvalidArgumentError, match=says):
                session.run("forward:0", feed)


def test_nothing_is_made_for_what_is_not_given():
    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = stf.ops.attention(x, x, x, PATTERN)
        return tape.gradient(output, x)

    graph = step.get_concrete_function(tf.TensorSpec([2, N, 2, 8])).graph
    forward, backward = (next(op for op in graph.get_operations() if op.type == name) for name in NODES)
    assert len(forward.inputs) == 3
    assert len(backward.inputs) == 6
    assert forward.get_attr("format") == backward.get_attr("format") == FORMAT


def test_the_gradient_of_a_log_sum_exp_that_is_asked_for_goes_through():
    x = tf.constant(random_inputs(1, 2, N, 2, 8, 8).query)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(stf.ops.attention(x, x, x, PATTERN, return_log_sum_exp=True)[1] ** 2)
        return tape.gradient(loss, x)

    backward = [op for op in step.get_concrete_function(x).graph.get_operations() if op.type == NODES[1]]
    assert [len(op.inputs) for op in backward] == [7]
    assert np.any(step(x))


@pytest.mark.parametrize("jit", [False, True])
def test_block_layouts_are_in_a_graph_once_however_many_ops_there_are(jit):
    x = tf.constant(random_inputs(1, 2, 60, 2, 8, 8).query)

    def two_steps(x):
        y = stf.ops.attention(x, x, x, LARGE)

        def again(i, z):
            return i + 1, stf.ops.attention(z, z, z, LARGE)

        return tf.while_loop(lambda i, _: i < 2, again, (0, y), maximum_iterations=2)[1]

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = two_steps(x)
        return output, tape.gradient(output, x)

    compiled = tf.function(gradient, jit_compile=jit)
    captures = compiled.get_concrete_function(x).graph.captures
    assert [tuple(inner.shape) for _, inner in captures] == [(450,)]
    for a, b in zip(compiled(x), gradient(x), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("pattern", [LARGE, stf.patterns.Blocks(LAYOUT, 2)], ids=["captured", "constant"])
@pytest.mark.parametrize("jit", [False, True])
def test_block_layouts_in_a_saved_model(tmp_path, pattern, jit):
    module = tf.Module()
    signature = [tf.TensorSpec([None, 60, 2, 8])]
    module.call = tf.function(lambda x: stf.ops.attention(x, x, x, pattern), input_signature=signature, jit_compile=jit)
    tf.saved_model.save(module, tmp_path)
    x = random_inputs(1, 2, 60, 2, 8, 8).query
    np.testing.assert_array_equal(tf.saved_model.load(tmp_path).call(x), stf.ops.attention(x, x, x, pattern))


def test_block_layouts_in_a_graph_that_is_no_functions():
    x = random_inputs(1, 2, 60, 2, 8, 8).query
    for _ in range(2):
        with tf.Graph().as_default() as graph:
            output = stf.ops.attention(tf.constant(x), x, x, LARGE)
            with tf.compat.v1.Session(graph=graph) as session:
                got = session.run(output)
        np.testing.assert_array_equal(got, stf.ops.attention(x, x, x, LARGE))
