"""Data sets as byte sequences."""

from stf.data import audio, cifar10, files, imagenet64, images, photographs
from stf.data.sequences import Splits, Stream, batches, crops, order0_entropy, windows

__all__ = [
    "Splits",
    "Stream",
    "audio",
    "batches",
    "cifar10",
    "crops",
    "files",
    "imagenet64",
    "images",
    "order0_entropy",
    "photographs",
    "windows",
]
