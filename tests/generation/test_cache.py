"""KeyValueCache beside attention over the whole sequence, and its room beside what the pattern's queries still read."""

import numpy as np
import pytest
import tensorflow as tf

import stf
from stf.generation import KeyValueCache

P = stf.patterns
N = 41
RNG = np.random.default_rng(0)
PATTERNS = {
    "causal": P.Causal(),
    "local": P.Local(3),
    "local of all": P.Local(2**31 - 1),
    "strided": P.Strided(5),
    "strided beyond": P.Strided(100),
    "own block": P.OwnBlock(4),
    "summary": P.Summary(5, 2),
    "summary beyond": P.Summary(50, 12),
    "first": P.Sink(3),
    "window and first": P.Window(5) | P.Sink(7),
    "fixed": P.Fixed(5, 2),
    "local + strided": P.Local(4) | P.Strided(4),
    "strided + strided": P.Strided(4) | P.Strided(6),
    "by head": P.PerHead([P.Local(2), P.Strided(6), P.Fixed(7, 1)]),
    "blocks": P.Blocks(RNG.random((6, 11, 11)) < 0.4, 4),
    "blocks + local": P.Blocks(RNG.random((11, 11)) < 0.3, 4) | P.Local(6),
    "a band of blocks": P.Blocks(np.triu(np.ones((11, 11), bool), -1), 4),
    "no key": P.Blocks(np.zeros((11, 11), bool), 4),
}
HEADS = 6
names = pytest.mark.parametrize("name", PATTERNS)


def inputs(dtype="float32"):
    random = np.random.default_rng(1)
    return [tf.cast(random.normal(size=(2, N, HEADS, depth)), dtype) for depth in (6, 6, 5)]


def cache_of(name, layers=1):
    return KeyValueCache(PATTERNS[name], HEADS, N, 6, 5, layers=layers)


@names
@pytest.mark.parametrize("begin", [0, 1, 17, 40])
def test_steps_behind_a_prefix_are_attention(name, begin):
    query, key, value = inputs()
    whole = stf.ops.attention(query, key, value, PATTERNS[name])
    cache = cache_of(name)
    state = cache.fill(key, value, begin) if begin else cache.zeros(2)

    @tf.function
    def step(state, position):
        new = (tf.gather(x, position, axis=1) for x in (query, key, value))
        query_, key_, value_ = new
        state = cache.write(state, key_, value_, position)
        return cache.attend(state, query_, position), state

    for position in range(begin, N):
        output, state = step(state, tf.constant(position))
        np.testing.assert_allclose(output, whole[:, position], atol=2e-6)


@names
@pytest.mark.parametrize("key_heads", [1, 2, 3])
def test_shared_heads_and_sinks(name, key_heads):
    query, key, value = inputs()
    key, value = key[:, :, :key_heads], value[:, :, :key_heads]
    sink = np.linspace(-2, 2, HEADS, dtype=np.float32)
    whole = stf.ops.attention(query, key, value, PATTERNS[name], sink=sink)
    cache = KeyValueCache(PATTERNS[name], HEADS, N, 6, 5, layers=2, num_key_value_heads=key_heads)
    assert cache.bytes(2) == sum(4 * tf.size(tensor) for tensor in cache.zeros(2))
    assert cache.bytes(2) <= cache_of(name, layers=2).bytes(2)
    for begin in (0, 17):
        state = cache.zeros(2)
        if begin:
            one = KeyValueCache(PATTERNS[name], HEADS, N, 6, 5, num_key_value_heads=key_heads)
            filled = one.fill(key, value, begin)
            state = [tf.concat([empty[: len(part)], part], 0) for empty, part in zip(state, filled, strict=True)]
        for position in range(begin, begin + 12):
            state = cache.write(state, key[:, position], value[:, position], position, layer=1)
            output = cache.attend(state, query[:, position], position, layer=1, sink=sink)
            np.testing.assert_allclose(output, whole[:, position], atol=2e-6)


def test_heads_that_do_not_share_evenly_are_refused():
    with pytest.raises(
        ValueError, match="`num_key_value_heads` must divide num_heads=6. Received: num_key_value_heads=4"
    ):
        KeyValueCache(P.Local(3), HEADS, N, 6, 5, num_key_value_heads=4)


@names
def test_what_an_op_is_told_to_read_is_what_the_pattern_attends_to(name):
    """Each position's number is its key: of every head, those in the slots of `reads`, behind writes of `writes`."""
    cache = cache_of(name)
    written = [np.full(shape[0], -1) for shape in cache.shapes(1)[::2]]
    told = tf.function(lambda position: (cache.reads(position), cache.writes(position)))
    for position in range(N):
        reads, writes = (x.numpy() for x in told(tf.constant(position)))
        for slots, slot in zip(written, writes, strict=True):
            if slot >= 0:
                slots[slot] = position
        parts = iter(zip(written, np.split(reads, np.cumsum(sum(cache.part_reads, []))[:-1]), strict=True))
        for program, counts in enumerate(cache.part_reads):
            seen = []
            for _ in counts:
                slots, read = next(parts)
                seen += list(slots[read[read >= 0]])
            attended = np.flatnonzero(PATTERNS[name].mask(N, program)[position])
            np.testing.assert_array_equal(np.sort(seen), attended, err_msg=f"position {position}, program {program}")


@names
def test_under_xla_and_for_several_layers(name):
    query, key, value = inputs()
    whole = stf.ops.attention(query, key, value, PATTERNS[name])
    cache = cache_of(name, layers=3)

    @tf.function(jit_compile=True)
    def loop(layer):
        def body(position, state, outputs):
            state = cache.write(state, key[:, position] * 0 + 9, value[:, position], position, 0)  # another layer's
            state = cache.write(state, key[:, position], value[:, position], position, layer)
            output = cache.attend(state, query[:, position], position, layer=layer)
            return position + 1, state, tf.tensor_scatter_nd_update(outputs, [[position]], output[None])

        state = (0, cache.zeros(2), tf.zeros([N, 2, HEADS, 5]))
        return tf.while_loop(lambda position, *_: position < N, body, state)[2]

    for layer in (1, 2):
        np.testing.assert_allclose(tf.transpose(loop(tf.constant(layer)), [1, 0, 2, 3]), whole, atol=2e-6)


@names
@pytest.mark.parametrize("count", [1, 5, 23, N])
def test_a_prefix_leaves_what_steps_would_have_left(name, count):
    """Of all that later queries read, whatever stands behind the prefix."""
    query, key, value = inputs()
    cache = cache_of(name)
    by_steps = cache.zeros(2)
    for position in range(count):
        by_steps = cache.write(by_steps, key[:, position], value[:, position], position)
    at_once = cache.fill(key, value, tf.constant(count))
    for position in range(count, N):
        new = key[:, position], value[:, position], position
        by_steps, at_once = cache.write(by_steps, *new), cache.write(at_once, *new)
        a, b = (cache.attend(state, query[:, position], position) for state in (by_steps, at_once))
        np.testing.assert_array_equal(a, b)


def still_read(pattern, n, head):
    """The most positions, over all times, that queries from then on still ask for."""
    mask = pattern.mask(n, head)
    later = np.logical_or.accumulate(mask[::-1])[::-1]  # [i, j]: whether a query from i on reads j
    return int((later & np.tril(np.ones((n, n), bool))).sum(1).max())


@pytest.mark.parametrize(
    ("pattern", "room"),
    [
        (P.Causal(), 1),
        (P.Local(31), 1),
        (P.Strided(32), 1.04),
        (P.OwnBlock(32), 1),
        (P.Summary(32, 4), 1.04),
        (P.Fixed(32, 4), 1.04),
        (P.Local(32) | P.Strided(32), 1.07),  # the last 33 are kept for both
        (P.PerHead([P.Local(32), P.Strided(32)]), 1.04),
        (P.Blocks(np.triu(np.ones((64, 64), bool), -3), 16), 1),
        (P.Blocks(np.random.default_rng(2).random((64, 64)) < 0.05, 16), 1.05),
    ],
    ids=repr,
)
def test_no_more_room_than_is_still_read(pattern, room):
    n = 1024
    cache = KeyValueCache(pattern, 2, n, 8, 4)
    for head in range(2):
        least = still_read(pattern, n, head)
        assert least <= cache.slots[head] <= room * least
    assert cache.bytes(3, "bfloat16") == 3 * sum(cache.slots) * (8 + 4) * 2
    assert cache.bytes(3, "bfloat16") == sum(x.numpy().nbytes for x in cache.zeros(3, "bfloat16"))


def test_caches_of_the_million_byte_preset_are_their_arithmetic():
    config = stf.models.presets.preset("audio-1m")
    n, heads, blocks = config["length"], config["num_heads"], config["num_blocks"]
    depth = config["model_dim"] // heads
    found = 0
    for index in range(blocks):
        pattern = config["patterns"][index % len(config["patterns"])]
        found += KeyValueCache(pattern, heads, n, depth, depth).bytes(1, "bfloat16")
    # 13 blocks are local, of l = 1,024: l + 1 keys. 12 are strided: all n. Keys and values of two bytes.
    assert found == (13 * 1025 + 12 * n) * config["model_dim"] * 2 * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_kept_and_float32_is_computed(dtype):
    query, key, value = inputs(dtype)
    cache = cache_of("local + strided")
    exact, half = cache.zeros(2), cache.zeros(2, dtype)
    for position in range(N):
        new = key[:, position], value[:, position], position
        exact, half = cache.write(exact, *new), cache.write(half, *new)
        a, b = (cache.attend(state, tf.cast(query[:, position], tf.float32), position) for state in (exact, half))
        np.testing.assert_array_equal(a, b)  # what is kept is what came
    assert cache.attend(half, query[:, 0], 0).dtype == query.dtype


def test_scale_and_float64():
    query, key, value = inputs("float64")
    cache = cache_of("fixed")
    state = cache.fill(key, value, N)
    output = cache.attend(state, query[:, N - 1], N - 1, scale=0.3)
    whole = stf.ops.reference_attention(query, key, value, PATTERNS["fixed"], scale=0.3)
    np.testing.assert_allclose(output, whole[:, N - 1], rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(num_heads=0), "num_heads=0"),
        (dict(length=0), "length=0"),
        (dict(key_dim=1.5), "key_dim=1.5"),
        (dict(value_dim=-1), "value_dim=-1"),
        (dict(layers=0), "layers=0"),
        (dict(pattern=PATTERNS["blocks"], num_heads=2), "num_heads=2"),
    ],
)
def test_refuses_bad_arguments_by_name(arguments, says):
    with pytest.raises(ValueError, match=says):
        KeyValueCache(**dict(pattern=P.Local(2), num_heads=2, length=8, key_dim=4, value_dim=4) | arguments)
