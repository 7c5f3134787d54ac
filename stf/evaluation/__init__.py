"""Bits for each byte of a whole split (Child et al. 2019, Section 7), and log-likelihoods of single tokens."""

from stf.evaluation.bits import Evaluation, evaluate, in_float32, score
from stf.evaluation.dynamic import evaluate_dynamically, gradient_scales

__all__ = ["Evaluation", "evaluate", "evaluate_dynamically", "gradient_scales", "in_float32", "score"]
