"""Packed documents, shared key and value heads, and sinks: values and gradients against float64, cell by cell."""

import numpy as np
import pytest
import tensorflow as tf
from paper_sets import segment_ids, within_documents

import stf
from ops.cases import HEADS, NAMES, case, check, run
from ops.float64_reference import DTYPES, random_inputs

N = 151
# Each dtype with each pattern is in the sweep; the test of all together has them too.
SOME_DTYPES = ["float32", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("bfloat16", "float16"))]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_in_documents(name, restart):
    ids = segment_ids(N, 4)
    pattern, mask = case(name, 12, N)
    documents = stf.ops.document_bounds(ids)
    inputs = random_inputs(2, len(ids), N, HEADS, 8, 12)
    check(inputs, pattern, within_documents(mask, ids, restart), name, documents=documents, restart=restart)


BLOCKS = ["own_block", "summary", "summary_second", "merged_fixed", "blocks", "blocks_of_heads", "all_kinds"]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_many_positions_counted_from_each_document(name):
    """Columns far apart, blocks that a tile's rows use alike, documents of several tiles and of a few positions."""
    n = 260
    ids = np.stack([np.zeros(n, np.int32), np.arange(n) >= 3, np.repeat([0, 1, -1, 2], [130, 7, 13, 110])])
    pattern, mask = case(name, 40, n)
    inputs = random_inputs(5, 3, n, HEADS, 8, 12, lengths=[n, n, 250])
    check(
        inputs, pattern, within_documents(mask, ids, True), name, documents=stf.ops.document_bounds(ids), restart=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["local", "strided", "merged_fixed", "all_kinds", "multihead_mixed"])
def test_documents_lengths_groups_and_sinks_together(name, dtype):
    """Each with every other: six heads, of which three share a key and value, and a sink."""
    ids = segment_ids(N, 4, 1)
    pattern, mask = case(name, 9, N)
    if name in ("all_kinds", "multihead_mixed"):
        inputs = random_inputs(3, 4, N, HEADS, 16, 24, dtype, [N, 100, 140, 3], key_heads=1, with_sink=True)
    else:
        inputs = random_inputs(3, 4, N, 2 * HEADS, 16, 24, dtype, [N, 100, 140, 3], key_heads=2, with_sink=True)
        mask = np.concatenate([mask, mask])
        if name == "merged_fixed":
            mask = np.stack([pattern.mask(N, head) for head in range(2 * HEADS)])
    for restart in (False, True):
        check(
            inputs,
            pattern,
            within_documents(mask, ids, restart),
            name,
            documents=stf.ops.document_bounds(ids),
            restart=restart,
        )


@pytest.mark.parametrize("dtype", SOME_DTYPES)
@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["causal", "strided", "merged_strided"])
def test_key_and_value_heads_that_are_shared(name, key_heads, dtype):
    pattern, mask = case(name, 7, 90)
    inputs = random_inputs(1, 8, 90, 6, 12, 20, dtype, key_heads=key_heads)
    check(inputs, pattern, np.concatenate([mask, mask]), f"{key_heads} of 6")


@pytest.mark.parametrize("dtype", SOME_DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_sinks(name, dtype):
    pattern, mask = case(name, 8, 77)
    results = check(random_inputs(4, 2, 77, HEADS, 8, 12, dtype, [77, 50], with_sink=True), pattern, mask)
    assert np.isfinite(results.log_sum_exp).all() and not results.output[1, 50:].any()


@pytest.mark.parametrize("sink", [-np.inf, -12.0, 12.0])
def test_sinks_beyond_all_scores(sink):
    pattern, mask = case("merged_strided", 8, 77)
    inputs = random_inputs(4, 2, 77, HEADS, 8, 12)._replace(sink=np.full(HEADS, sink, np.float32))
    if sink > -np.inf:
        check(inputs, pattern, mask)
        return
    with_none, without = run(inputs, pattern), run(inputs._replace(sink=None), pattern)
    for ours, other in zip(with_none[:5], without, strict=True):
        np.testing.assert_array_equal(ours, other)
    assert not with_none.sink_grad.any()


def test_a_sinks_gradient_does_not_look_beyond_a_length():
    inputs = random_inputs(4, 2, 50, HEADS, 8, 12, lengths=[20, 33], with_sink=True)
    spoilt = [x.copy() for x in (*inputs[:3], inputs.output_grad)]
    for x in spoilt:
        x[0, 20:], x[1, 33:] = np.nan, np.inf
    dirty = inputs._replace(query=spoilt[0], key=spoilt[1], value=spoilt[2], output_grad=spoilt[3])
    pattern = stf.patterns.Local(5) | stf.patterns.Strided(6)
    for a, b in zip(run(inputs, pattern), run(dirty, pattern), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", ["function", "unknown shapes", "xla", "xla, unknown shapes"])
@pytest.mark.parametrize("name", ["merged_strided", "merged_fixed", "blocks_and_local"])
def test_same_bits_in_graphs_and_under_xla(name, mode):
    ids = segment_ids(60, 4)
    pattern, _ = case(name, 7, 60)
    inputs = random_inputs(9, 4, 60, HEADS, 8, 8, key_heads=1, with_sink=True)
    signature = [tf.TensorSpec([None] * 2, tf.int32), *[tf.TensorSpec([None, None, h, None]) for h in (HEADS, 1, 1)]]

    def call(ids, query, key, value, sink=inputs.sink, **arguments):
        bounds = stf.ops.document_bounds(ids)
        return stf.ops.attention(query, key, value, pattern, documents=bounds, restart=True, sink=sink, **arguments)

    compiled = tf.function(
        lambda *tensors: call(*tensors, scale=0.4, return_log_sum_exp=True),
        jit_compile="xla" in mode,
        input_signature=signature if "unknown shapes" in mode else None,
    )
    one = call(ids, *map(tf.constant, inputs[:3]), scale=0.4, return_log_sum_exp=True)
    for ours, other in zip(compiled(ids, *map(tf.constant, inputs[:3])), one, strict=True):
        np.testing.assert_array_equal(ours, other)

    def gradients(query, key, value, sink):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value, sink])
            output = call(ids, query, key, value, sink)
        return tape.gradient(output, [query, key, value, sink], tf.constant(inputs.output_grad))

    tensors = [*map(tf.constant, inputs[:3]), tf.constant(inputs.sink)]
    plain = gradients(*tensors)
    for ours, other in zip(tf.function(gradients, jit_compile="xla" in mode)(*tensors), plain, strict=True):
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-5 * float(tf.reduce_max(abs(other))))
    for again, first in zip(gradients(*tensors), plain, strict=True):
        np.testing.assert_array_equal(again, first)


def test_reference_is_the_specification():
    ids = segment_ids(70, 4)
    for name in NAMES:
        pattern, _ = case(name, 9, 70)
        inputs = random_inputs(6, 4, 70, HEADS, 8, 12, lengths=[70, 60, 70, 70], key_heads=1, with_sink=True)
        for restart in (False, True):
            arguments = {"documents": stf.ops.document_bounds(ids), "restart": restart}
            ours = run(inputs, pattern, **arguments)
            dense = run(inputs, pattern, stf.ops.reference_attention, **arguments)
            for x, y in zip(ours, dense, strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=3e-5, err_msg=f"{name} {restart}")


def test_bounds_by_ids_and_by_starts():
    ids = np.array([[5, 5, 2, 2, 2, 9], [-1, 1, 1, -3, 4, -1]])
    first = [[0, 0, 2, 2, 2, 5], [1, 1, 1, 4, 4, 6]]
    end = [[2, 2, 5, 5, 5, 6], [0, 3, 3, 3, 5, 5]]
    np.testing.assert_array_equal(stf.ops.document_bounds(ids), np.stack([first, end], -1))
    starts = np.array([[0, 2, 5, -1], [4, 1, 99, 4]])
    first = [[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 4, 4]]
    end = [[2, 2, 5, 5, 5, 6], [1, 4, 4, 4, 6, 6]]
    want = np.stack([first, end], -1)
    np.testing.assert_array_equal(stf.ops.document_bounds(document_starts=starts, positions=6), want)
    dynamic = tf.function(
        lambda x, n: stf.ops.document_bounds(document_starts=x, positions=n),
        input_signature=[tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([], tf.int32)],
    )
    np.testing.assert_array_equal(dynamic(starts, 6), want)
    assert stf.ops.document_bounds(np.zeros((2, 0), int)).shape == (2, 0, 2)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[1013] * 1000, pytest.param([2**24 + 1, 4], marks=pytest.mark.slow)],  # more than float32 tells apart
    ids=["thousand documents", "two, long"],
)
def test_bounds_of_many_positions_whose_number_is_not_known_before(lengths, jit_compile):
    signature = [tf.TensorSpec([None, None], tf.int32)]
    dynamic = tf.function(stf.ops.document_bounds, input_signature=signature, jit_compile=jit_compile)
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
    ends = np.cumsum(lengths)
    for bounds in (dynamic(ids), stf.ops.document_bounds(ids)):
        np.testing.assert_array_equal(bounds[0, :, 0], (ends - lengths)[ids[0]])
        np.testing.assert_array_equal(bounds[0, :, 1], ends[ids[0]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "One of segment_ids and document_starts must be given"),
        ({"segment_ids": [[0, 1]], "document_starts": [[0]]}, "One of segment_ids and document_starts"),
        ({"segment_ids": [[0.5, 1.0]]}, r"segment_ids must be integers. Received: segment_ids=\[\[0.5"),
        ({"segment_ids": tf.zeros([2, 3])}, "segment_ids must be integers .* Received: segment_ids=<float32"),
        ({"segment_ids": [0, 1]}, r"segment_ids must be integers \[batch, position\]"),
        ({"document_starts": [[0, 1]]}, "positions must be given"),
        (
            {"segment_ids": [[0, 0, 1]], "positions": 7},
            "positions must be that of segment_ids, 3. Received: positions=7",
        ),
        ({"document_starts": [[0]], "positions": 5.7}, "`positions` must be an integer, 0 or more"),
        (
            {"document_starts": [[0]], "positions": -3},
            "`positions` must be an integer, 0 or more. Received: positions=-3",
        ),
        ({"document_starts": [[0]], "positions": tf.constant(2.0)}, "positions must be an integer scalar"),
    ],
)
def test_bounds_refuse(arguments, words):
    with pytest.raises(ValueError, match=words):
        stf.ops.document_bounds(**arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"documents": tf.zeros([2, 7, 2], tf.int32)}, r"documents must be .* \(2, 8, 2\). Received: .* \(2, 7, 2\)"),
        ({"documents": tf.zeros([2, 8, 2])}, "documents must be .* int32 .* Received: documents=<float32"),
        (
            {"sink": tf.zeros([3])},
            r"sink must be floats of shape \[4\], one a head. Received: .* \(3,\)",
        ),
        ({"sink": tf.zeros([4], tf.int32)}, "sink must be floats"),
        ({"key": tf.zeros([2, 8, 3, 5])}, "key must have a number of heads that divides the query's, 4"),
        ({"key": tf.zeros([2, 8, 2, 5])}, r"value must have shape \(2, 8, 2, 6\)"),
        ({"value": tf.zeros([2, 8, 2, 6])}, r"value must have shape \(2, 8, 4, 6\)"),
        ({"query": tf.zeros([2, 8, 0, 5])}, "key must have a number of heads that divides the query's, 0"),
    ],
)
def test_the_op_refuses(change, words):
    arguments = {"query": tf.zeros([2, 8, 4, 5]), "key": tf.zeros([2, 8, 4, 5]), "value": tf.zeros([2, 8, 4, 6])}
    for op in (stf.ops.attention, stf.ops.reference_attention):
        with pytest.raises(ValueError, match=words):
            op(**arguments | change, pattern=stf.patterns.Causal())
