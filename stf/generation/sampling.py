"""Samples of a model, drawn bit by bit or whole."""

import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from stf.generation.decoder import Decoder
from stf.layers.validation import positive, seed_or_none
from stf.typing import TensorLike

if TYPE_CHECKING:
    from stf.models import SparseTransformer


class Sampler:
    """Samples of a `SparseTransformer` that are drawn bit by bit: as many tokens at a time as one likes.

    A token depends on the seed, its position and the tokens before it, not on how many are drawn at a time. What was
    drawn stays when drawing is interrupted, and the next call goes on; a new sampler goes on from another's `tokens` as
    a prefix (in another process too), to rounding.

    Examples:
        >>> patterns = [stf.patterns.Local(8), stf.patterns.Strided(8)]
        >>> model = stf.models.SparseTransformer(64, (8, 8), patterns, num_blocks=2, num_heads=2, model_dim=16)
        >>> sampler = stf.generation.Sampler(model, batch_size=2, seed=1)
        >>> while not sampler.done:
        ...     print(sampler.draw(32).shape)
        (2, 32)
        (2, 32)

    Args:
        model: a `SparseTransformer`.
        batch_size: number of samples, where no prefix says it.
        temperature: divides the logits; 0 takes the likeliest token.
        prefix: integer tokens `[position]` or `[batch, position]` that the samples begin with.
        length: tokens of a sample, the prefix included; the model's unless given.
        seed: of the draws, an int from 0 to 2**32 - 1; another at every call unless given.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the fewest likeliest tokens whose probabilities add up to p or more.
        stop: a token or several: a sample ends behind the first that it draws, and repeats it from there on.
        cache_dtype: of the keys and values that are kept; the dtype that the model computes in unless given.
        conditions: integers `[condition]` or `[batch, condition]`, of a model that has them; all 0 unless given.

    Attributes:
        tokens: int32 `[batch, position]`, the prefix and what was drawn, a NumPy array.
        done: whether all samples have ended or are as long as they get.
        cache_bytes: bytes of the keys and values that are kept.
        decoder: the model's `Decoder` for this batch size and length.

    Raises:
        ValueError: an argument that does not fit; names it.
    """

    def __init__(
        self,
        model: "SparseTransformer",
        batch_size: int = 1,
        temperature: float = 1.0,
        prefix: TensorLike | None = None,
        length: int | None = None,
        seed: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | Sequence[int] | None = None,
        cache_dtype: str | None = None,
        conditions: TensorLike | None = None,
    ) -> None:
        length = model.length if length is None else positive("length", length)
        seed = seed_or_none(seed)
        self._check(model, temperature, top_k, top_p)
        prefix = _prefix(prefix, positive("batch_size", batch_size), length, model.vocab_size)
        stop = _stop(stop, model.vocab_size)
        seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self._options = dict(seed=seed, temperature=float(temperature), top_k=top_k, top_p=top_p, stop=stop)
        self._conditions = _conditions(conditions, len(prefix), model.conditions)
        self.length = length
        self.decoder = _decoder_of(model, len(prefix), length, cache_dtype)
        # One tuple, so that an interruption finds all of it as it was or all as it is now: tokens, the decoder's state
        # behind them (None: not begun), and which samples have ended.
        self._drawn = prefix, None, np.zeros(len(prefix), bool)

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """What was drawn so far, behind the prefix."""
        return self._drawn[0]

    @property
    def done(self) -> bool:
        """Whether nothing is left to draw."""
        tokens, _, ended = self._drawn
        return tokens.shape[1] == self.length or bool(np.all(ended))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return self.decoder.bytes

    def draw(self, count: int) -> npt.NDArray[np.int32]:
        """Draws up to `count` tokens more of each sample.

        Returns:
            What was drawn, int32 `[batch, position]`: fewer positions where all samples have ended, or are as long as
            they get.
        """
        begin = self.tokens.shape[1]
        end = min(begin + positive("count", count), self.length)
        while self.tokens.shape[1] < end and not self.done:
            self._draw(min(CHUNK, end - self.tokens.shape[1]))
        return self.tokens[:, begin:]

    def _draw(self, count):
        before, state, ended = self._drawn
        if state is None:
            state = self.decoder.prefill(before, self._conditions)
        position = before.shape[1]
        last = before[:, -1] if position else np.zeros(len(before), np.int32)
        tokens, drawn, ended, state = self.decoder.draw(
            state, last, ended, position, count, most=CHUNK, conditions=self._conditions, **self._options
        )
        self._drawn = np.concatenate([before, tokens[:, : int(drawn)].numpy()], 1), state, ended.numpy()

    @staticmethod
    def _check(model, temperature, top_k, top_p):
        if not isinstance(temperature, numbers.Real) or not 0 <= temperature < np.inf:
            raise ValueError(f"temperature must be a number, 0 or more. Received: temperature={temperature!r}")
        if top_k is not None and positive("top_k", top_k) > model.vocab_size:
            raise ValueError(f"top_k must be from 1 to {model.vocab_size}. Received: top_k={top_k!r}")
        if top_p is not None and not (isinstance(top_p, numbers.Real) and 0 < top_p <= 1):
            raise ValueError(f"top_p must be above 0 and at most 1. Received: top_p={top_p!r}")


CHUNK = 64  # tokens that one call of the compiled loop draws at the most
DECODERS = 8  # of a model that are kept, each for a batch size and a length


def generate(
    model: "SparseTransformer", verbose: int = 1, callback: Callable[[np.ndarray], Any] | None = None, **arguments: Any
) -> npt.NDArray[np.int32]:
    """Samples of a `SparseTransformer`; see its method of the same name."""
    sampler = Sampler(model, **arguments)
    if verbose == 2:
        print(f"caches: {sampler.cache_bytes:,} bytes for {len(sampler.tokens)} sequences of {sampler.length} tokens")
    bar = keras.utils.Progbar(sampler.length, unit_name="token") if verbose else None
    while not sampler.done:
        drawn = sampler.draw(CHUNK)
        if callback is not None:
            callback(drawn)
        if bar:
            bar.update(sampler.tokens.shape[1], finalize=sampler.done)
    return sampler.tokens


def _decoder_of(model, batch_size, length, cache_dtype):
    """The model's decoder for these sizes: made, traced and compiled once."""
    if not model.built:
        model.build((None, length))
    decoders = model.__dict__.setdefault("_decoders_by_size", {})
    key = batch_size, length, tf.as_dtype(cache_dtype or model.compute_dtype).name, model.compute_dtype
    decoder = decoders.pop(key, None) or Decoder(model, batch_size, length, cache_dtype)
    decoders[key] = decoder  # the latest last
    if len(decoders) > DECODERS:
        del decoders[next(iter(decoders))]
    return decoder


def _stop(stop, vocab_size):
    """Tokens that end a sample, a tuple of ints."""
    tokens = [] if stop is None else np.atleast_1d(np.asarray(stop))
    for token in tokens:
        if np.asarray(token).dtype.kind not in "iu" or not 0 <= token < vocab_size:
            raise ValueError(f"stop must be tokens from 0 to {vocab_size - 1}. Received: stop={stop!r}")
    return tuple(int(token) for token in tokens)


def _conditions(conditions, batch_size, sizes):
    """The conditions of samples, int32 `[batch, condition]`, or None; ValueError where they do not fit."""
    if conditions is None:
        return None
    found = np.asarray(conditions)
    if found.ndim == 1:
        found = np.tile(found, (batch_size, 1))
    if found.shape != (batch_size, len(sizes)) or not len(sizes) or found.dtype.kind not in "iu":
        raise ValueError(
            f"conditions must be integers [{len(sizes)}] or [{batch_size}, {len(sizes)}], of a model that has them. "
            f"Received: conditions={conditions!r}"
        )
    if (found < 0).any() or (found >= np.array(sizes)).any():
        raise ValueError(f"conditions must be from 0 to below {sizes}. Received: conditions={conditions!r}")
    return tf.constant(found, tf.int32)


def _prefix(prefix, batch_size, length, vocab_size):
    """The tokens that samples begin with, int32 `[batch, position]`; ValueError where they are none."""
    prefix = np.zeros((batch_size, 0), np.int32) if prefix is None else np.asarray(prefix)
    if prefix.ndim == 1:
        prefix = np.tile(prefix, (batch_size, 1))
    if prefix.ndim != 2 or prefix.shape[1] > length:
        raise ValueError(
            f"prefix must be [position] or [batch, position] with at most {length} positions. "
            f"Received: prefix of shape {prefix.shape}"
        )
    if prefix.size and prefix.dtype.kind not in "iu":
        raise ValueError(f"prefix must be integer tokens. Received: prefix of dtype {prefix.dtype}, prefix={prefix!r}")
    for token in prefix[(prefix < 0) | (prefix >= vocab_size)][:1]:
        raise ValueError(f"prefix must hold tokens from 0 to {vocab_size - 1}. Received: prefix with token {token}")
    return prefix.astype(np.int32)
