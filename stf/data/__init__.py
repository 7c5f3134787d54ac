"""Data sets as byte sequences."""

from stf.data import cifar10, photographs
from stf.data.sequences import Splits, batches, order0_entropy

__all__ = ["Splits", "batches", "cifar10", "order0_entropy", "photographs"]
