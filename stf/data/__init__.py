"""Data sets as byte sequences."""

from stf.data import audio, cifar10, files, imagenet64, images, photographs
from stf.data.augmentation import ImageTransformations
from stf.data.sequences import Splits, Stream, batches, crops, order0_entropy, windows

__all__ = [
    "ImageTransformations",
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
