"""Samples from a model: caches, a prefix at once, steps, draws; each also for a model of one's own."""

from stf.generation.cache import KeyValueCache
from stf.generation.categorical import draw
from stf.generation.decoder import Decoder
from stf.generation.sampling import Sampler, generate

__all__ = ["Decoder", "KeyValueCache", "Sampler", "draw", "generate"]
