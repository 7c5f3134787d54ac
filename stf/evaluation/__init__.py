"""Bits for each byte of a whole split (Child et al. 2019, Section 7)."""

from stf.evaluation.bits import Evaluation, evaluate, in_float32

__all__ = ["Evaluation", "evaluate", "in_float32"]
