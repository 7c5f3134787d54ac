"""The stack as one op: what can be seen of it without a GPU. What it computes: tests/gpu/test_residual_stack.py."""

import contextlib
import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

import stf
from stf import patterns
from stf.layers.block import BlockWeights
from stf.layers.residual_loop import ResidualLoop
from stf.ops import library
from stf.ops.residual_stack import _joint_program, _load_cublas, residual_stack, runs_residual_stack
from stf.patterns import Program, components_mask

LAYOUTS = [np.tril(np.random.default_rng(k).random((4, 4)) < 0.6) for k in range(2)]


def test_programs_of_several_patterns_are_those_of_each():
    several = [
        patterns.Blocks(LAYOUTS[0], 6),
        patterns.PerHead([patterns.Local(3), patterns.Blocks(LAYOUTS[1], 6)]),
        patterns.Fixed(5, 2),
        patterns.Local(2) | patterns.Strided(7),
    ]
    heads, n = 2, 24
    arguments, first = _joint_program(tuple(several), heads)
    packed = arguments.keywords()
    components, begin = packed["components"], packed["program_begin"]
    assert first[0] == 0 and first[-1] == len(begin) - 1 and len(first) == len(several) + 1
    for pattern, lowest, end in zip(several, first, first[1:], strict=False):
        of_pattern = [b - begin[lowest] for b in begin[lowest : end + 1]]
        program = Program(
            components[6 * begin[lowest] : 6 * begin[end]], of_pattern, bytes(packed["layout_bits"][0].numpy())
        )
        for head in range(heads):
            parts = components_mask(program, n, head)
            np.testing.assert_array_equal(parts.sum(0), pattern.mask(n, head))  # disjoint, and all


@pytest.mark.parametrize(
    "sizes",
    [
        (tf.float32, 64, 128, 2, 16, 32),
        (tf.bfloat16, 60, 128, 2, 16, 32),
        (tf.bfloat16, 64, 100, 2, 16, 32),
        (tf.bfloat16, 64, 128, 1, 16, 30),
        (tf.bfloat16, 2056, 128, 2, 16, 32),
        (tf.bfloat16, 64, 128, 2, 264, 32),
    ],
)
def test_what_the_op_does_not_take_runs_as_a_loop(sizes, monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])  # as if there were a GPU
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    dtype, width, *rest = sizes
    assert not runs_residual_stack(tf.zeros([1, 8, width], dtype), *rest)
    assert runs_here()
    monkeypatch.setattr(library, "has_cuda", lambda: False)
    assert not runs_here()


def runs_here(x=None):
    return runs_residual_stack(tf.zeros([1, 8, 64], tf.bfloat16) if x is None else x, 128, 2, 16, 32)


@pytest.mark.parametrize("scope", ["around the call", "around the function", "within the function"])
def test_what_is_placed_on_a_cpu_runs_as_a_loop(scope, monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    assert runs_here()
    found = []

    @tf.function
    def traced(x):
        with tf.device("CPU:0") if scope == "within the function" else contextlib.nullcontext():
            found.append(runs_here(x))
        return x

    x = tf.zeros([1, 8, 64], tf.bfloat16)
    with tf.device("CPU:0") if scope != "within the function" else contextlib.nullcontext():
        found.append(runs_here()) if scope == "around the call" else traced(x)
    assert found == [False]
    traced(tf.zeros([2, 8, 64], tf.bfloat16))
    assert found[1:] == [scope != "within the function"]


def test_a_cpu_runs_the_loop():
    with tf.device("CPU"):
        assert not runs_here()


def test_shapes_and_gradients_are_known_before_it_runs(monkeypatch):
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    stack = stf.layers.SparseResidualStack(3, [patterns.Local(4)], 2, 16, dropout=0.1, dtype="mixed_bfloat16")
    stack.build([None, None, 64])

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = residual_stack(x, stack.stacked_weights(), tf.constant([1, 2]), [patterns.Local(4)], 2, 16, 0.1)
        return output, tape.gradient(output, [x, *stack.trainable_variables])

    graph = tf.function(step).get_concrete_function(tf.TensorSpec([2, None, 64], tf.bfloat16))
    output, (x_grad, *grads) = graph.structured_outputs
    assert output.shape.as_list() == x_grad.shape.as_list() == [2, None, 64]
    assert [grad.shape for grad in grads] == [variable.shape for variable in stack.trainable_variables]
    assert {grad.dtype for grad in grads} == {tf.float32}
    with pytest.raises(ValueError, match=r"input must be \[batch, position, width\]"):
        tf.function(step).get_concrete_function(tf.TensorSpec([2, 64], tf.bfloat16))


def test_cublas_of_nvidias_wheels_is_loaded_by_its_path(tmp_path, monkeypatch):
    for package, number in (("cu13", 13), ("cublas", 12)):
        (tmp_path / "nvidia" / package / "lib").mkdir(parents=True)
        (tmp_path / "nvidia" / package / "lib" / f"libcublasLt.so.{number}").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    loaded = []
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)
    assert _load_cublas.__wrapped__() == loaded[0]
    assert loaded == [str(tmp_path / "nvidia" / "cublas" / "lib" / "libcublasLt.so.12")]


@pytest.mark.parametrize("eager", [True, False])
def test_gradients_of_the_op_reach_their_weights(eager, monkeypatch):
    """With a stand-in for the kernels: TensorFlow's loop, which the op is to compute the same as."""
    stack = stf.layers.SparseResidualStack(
        3, [patterns.Local(4)], 2, 16, dropout=0.25, recompute=True, dtype="mixed_bfloat16", seed=1
    )
    stack.build([None, None, 64])
    x = tf.random.stateless_normal([2, 8, 64], [1, 2], dtype=tf.bfloat16)
    kept_by_eager = []

    def forward(stream, *weights_and_seed, **attributes):
        assert attributes["keep"] == 0 and attributes["drop_below"] == 2**30
        *weights, seed = weights_and_seed
        output = ResidualLoop(stack.make_block, BlockWeights(*weights), 1, True, seed)(stream)
        kept_by_eager.append(stream)
        return output, stream, tf.zeros([0])

    def gradient(stream, statistics, upstream, *weights_and_seed, **attributes):
        *weights, seed = weights_and_seed
        with tf.GradientTape() as tape:
            tape.watch([stream, *weights])
            output = ResidualLoop(stack.make_block, BlockWeights(*weights), 1, True, seed)(stream)
        return tape.gradient(output, [stream, *weights], upstream)

    def step(x):
        stack.seed_generator.state.assign([5, 7])
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = stack(x, training=True)
        return output, *tape.gradient(output, [x, *stack.trainable_variables], tf.sin(output))

    by_loop = (step if eager else tf.function(step))(x)
    monkeypatch.setattr(stf.ops, "runs_residual_stack", lambda *_: True)
    real = library.load()
    stand_in = SimpleNamespace(
        stf_residual_stack=forward,
        stf_residual_stack_grad=gradient,
        stf_packed_attention=real.stf_packed_attention,
        stf_packed_attention_grad=real.stf_packed_attention_grad,
    )
    monkeypatch.setattr(library, "load", lambda: stand_in)
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    by_op = (step if eager else tf.function(step))(x)
    assert len(kept_by_eager) == 1
    for a, b in zip(by_op, by_loop, strict=True):
        assert a.dtype == b.dtype
        scale = float(tf.reduce_max(tf.abs(b)))
        np.testing.assert_allclose(tf.cast(a, tf.float32), tf.cast(b, tf.float32), atol=2e-2 * scale)
    with tf.GradientTape() as outer:
        outer.watch(x)
        grad = step(x)[1]
    if eager:
        with pytest.raises(LookupError, match="differentiable once"):
            outer.gradient(grad, x)


def test_a_library_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(library, "has_cuda", lambda: False)
    with pytest.raises(library.LibraryNotFoundError, match="without CUDA"):
        residual_stack(tf.zeros([1, 8, 64], tf.bfloat16), [], None, [patterns.Local(4)], 2, 16)
