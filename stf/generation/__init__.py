"""Samples from a model, token by token, with caches."""

from stf.generation.decoder import Decoder
from stf.generation.sampling import draw, generate

__all__ = ["Decoder", "draw", "generate"]
