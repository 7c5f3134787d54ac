"""Samplers: the same tokens however they are drawn, prefixes, ends, interruptions, one compilation."""

import time

import numpy as np
import pytest
import tensorflow as tf
from generation.test_generation import PATTERNS, N, make, tokens

import stf
from stf.generation import Decoder, Sampler


def drawn_by(sampler, *counts):
    return [sampler.draw(count) for count in counts]


@pytest.mark.parametrize(
    "pattern",
    [p if p in (PATTERNS[6], PATTERNS[8]) else pytest.param(p, marks=pytest.mark.slow) for p in PATTERNS],
    ids=str,
)
def test_the_same_seed_gives_the_same_tokens_however_they_are_drawn(pattern):
    model = make([pattern])
    arguments = dict(batch_size=3, seed=2**32 - 1, top_k=9, top_p=0.95)
    whole = model.generate(verbose=0, **arguments)
    parts = Sampler(model, **arguments)
    found = drawn_by(parts, 1, 2, 13, 9, 100)
    assert [x.shape[1] for x in found] == [1, 2, 13, 9, N - 25]
    assert parts.done and parts.draw(5).shape == (3, 0)
    np.testing.assert_array_equal(np.concatenate(found, 1), whole)
    np.testing.assert_array_equal(parts.tokens, whole)


EVERY = [("float32", pattern) for pattern in PATTERNS] + [("mixed_bfloat16", PATTERNS[6])]
SLOW = [(policy, pattern) for policy in ("mixed_bfloat16", "mixed_float16") for pattern in PATTERNS]
SLOW.remove(EVERY[-1])


@pytest.mark.parametrize(
    ("policy", "pattern"), [*EVERY, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def test_a_prefix_at_once_is_a_prefix_token_by_token(policy, pattern):
    """Logits behind it; the bound is twice what halves themselves differ by from float32, as for single steps."""
    exact, model = make([pattern], dtype="float32"), make([pattern], dtype=policy)
    model.set_weights(exact.get_weights())
    x, begin = tokens(), 17
    truth = exact(x).numpy()
    decoder = Decoder(model, len(x), N)
    state, error = decoder.prefill(x[:, :begin]), 0
    for position in range(begin, N):
        logits, state = decoder.step(state, x[:, position - 1], position)
        error = max(error, np.abs(logits - truth[:, position]).max())
    unit = {"float32": 2e-6, "mixed_bfloat16": 2.0**-8, "mixed_float16": 2.0**-11}[policy]
    allowed = 0 if policy == "float32" else 2 * np.abs(model(x).numpy() - truth).max()
    assert error <= allowed + unit * np.abs(truth).max()


@pytest.mark.parametrize("length", [1, 5, 11])
def test_prefixes_of_every_length(length):
    model, x = make(PATTERNS[6:7]), tokens()
    want = np.argmax(model(x[:, :length]), -1)
    for begin in range(length):
        sampler = Sampler(model, prefix=x[:, :begin], length=length, temperature=0)
        assert sampler.draw(1)[0, 0] == want[0, begin]


def test_one_prefix_for_all_samples():
    model, x = make(PATTERNS[6:7]), tokens()
    one = model.generate(batch_size=3, prefix=x[0, :9], seed=4, verbose=0)
    np.testing.assert_array_equal(one[:, :9], np.tile(x[0, :9], (3, 1)))
    np.testing.assert_array_equal(model.generate(prefix=one[:, :9], seed=4, verbose=0), one)
    assert len(np.unique(one[:, 9:], axis=0)) == 3


def test_what_was_drawn_stays_when_interrupted_and_the_rest_goes_on():
    model = make(PATTERNS[6:7])
    whole = model.generate(batch_size=2, seed=7, verbose=0)
    sampler = Sampler(model, batch_size=2, seed=7)
    sampler.draw(11)
    draw, broken = sampler.decoder.draw, []

    def interrupted(*arguments, **keywords):
        if not broken:
            broken.append(True)
            raise KeyboardInterrupt
        return draw(*arguments, **keywords)

    sampler.decoder.draw = interrupted
    with pytest.raises(KeyboardInterrupt):
        sampler.draw(N)
    np.testing.assert_array_equal(sampler.tokens, whole[:, :11])
    sampler.draw(N)
    np.testing.assert_array_equal(sampler.tokens, whole)
    elsewhere = Sampler(make(PATTERNS[6:7]), prefix=whole[:, :11], seed=7)  # in another process
    elsewhere.draw(N)
    np.testing.assert_array_equal(elsewhere.tokens, whole)


def test_stop_tokens_end_a_sample_and_are_repeated():
    model = make(PATTERNS[6:7])
    free = model.generate(batch_size=4, seed=1, verbose=0)
    stop = int(free[0, 6])
    found = model.generate(batch_size=4, seed=1, stop=[stop, int(free[1, 3])], verbose=0)
    ends = []
    for row, want in zip(found, free, strict=True):
        ended = np.flatnonzero(np.isin(want, [stop, free[1, 3]]))
        ends.append(ended[0] + 1 if len(ended) else N)
        np.testing.assert_array_equal(row[: ends[-1]], want[: ends[-1]])
        assert np.all(row[ends[-1] :] == row[ends[-1] - 1])
    assert found.shape[1] == max(ends)
    # A prefix that ends in a stop token goes on.
    assert model.generate(prefix=[[1, stop]], seed=1, stop=stop, verbose=0).shape[1] > 2


def test_callback_and_bytes(capsys):
    model, found = make(PATTERNS[6:7]), []
    whole = model.generate(batch_size=2, seed=3, verbose=2, callback=found.append)
    np.testing.assert_array_equal(np.concatenate(found, 1), whole)
    decoder = Decoder(model, 2, N)
    said = capsys.readouterr().out
    assert f"caches: {decoder.bytes:,} bytes" in said and f"{N}/{N}" in said
    assert Decoder(model, 2, N, cache_dtype="bfloat16").bytes == decoder.bytes // 2


def test_caches_in_float32_under_a_half_policy():
    model = make(PATTERNS[6:7], dtype="mixed_bfloat16")
    assert Decoder(model, 1, N).cache_dtype == tf.bfloat16
    drawn = [model.generate(seed=1, verbose=0, cache_dtype=dtype) for dtype in (None, "float32")]
    np.testing.assert_array_equal(*drawn)  # what is kept was computed in bfloat16 either way


def test_traced_and_compiled_once_for_a_size():
    model = make(PATTERNS[1:4])
    first = model.generate(batch_size=2, prefix=tokens()[:, :5], seed=1, verbose=0)
    decoder = Sampler(model, batch_size=2).decoder
    functions = decoder._prefill, decoder._several
    traced = [function.experimental_get_tracing_count() for function in functions]
    seconds = []
    for length in (8, 7, 6):  # each for the first time, so that each would be compiled
        begin = time.perf_counter()
        Sampler(model, prefix=tokens()[:, :length], seed=2, temperature=0.5).draw(1)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.05  # a machine may be busy once
    assert [function.experimental_get_tracing_count() for function in functions] == traced
    for weight in model.trainable_variables:  # other weights need no other function
        weight.assign(weight * 1.1)
    assert not np.array_equal(model.generate(batch_size=2, prefix=tokens()[:, :5], seed=1, verbose=0), first)


def test_more_blocks_than_are_unrolled_give_the_same(monkeypatch):
    model = make([PATTERNS[1], PATTERNS[6]] * 2)  # 5 blocks of a period of 2: two periods and one more
    monkeypatch.setattr(stf.generation.decoder, "UNROLLED", 2)
    looped = stf.generation.generate(model, 0, batch_size=2, seed=3)
    monkeypatch.setattr(stf.generation.decoder, "UNROLLED", 100)
    model.__dict__.pop("_decoders_by_size")
    unrolled = model.generate(batch_size=2, seed=3, verbose=0)
    np.testing.assert_array_equal(looped, unrolled)
    want = model(unrolled).numpy()
    model.__dict__.pop("_decoders_by_size")
    monkeypatch.setattr(stf.generation.decoder, "UNROLLED", 0)
    decoder = Decoder(model, 2, N)
    state = decoder.prefill(unrolled[:, :11])
    logits, _ = decoder.step(state, unrolled[:, 10], 11)
    np.testing.assert_allclose(logits, want[:, 11], atol=3e-6 * np.abs(want).max())


def test_layouts_that_serve_one_length_alone():
    pattern = stf.patterns.Blocks(np.tril(np.ones((8, 8), bool)), 4)  # 29 to 32 positions
    model, x = make([pattern]), tokens()
    found = model.generate(prefix=x[:, :3], length=9, temperature=0, verbose=0)
    np.testing.assert_array_equal(found[:, 3:], np.argmax(model(np.pad(found, ((0, 0), (0, N - 9)))), -1)[:, 3:9])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(stop=13), "stop=13"),
        (dict(stop=[1, -1]), r"stop=\[1, -1\]"),
        (dict(stop=1.5), "stop=1.5"),
        (dict(prefix=np.zeros((1, 1, 1), int)), "prefix of shape"),
        (dict(temperature=np.inf), "temperature=inf"),
    ],
)
def test_refuses_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        Sampler(make(PATTERNS[:1]), **arguments)


def test_refuses_counts_that_are_none():
    with pytest.raises(ValueError, match="count=0"):
        Sampler(make(PATTERNS[:1])).draw(0)
