"""CIFAR-10 as sequences of 3,072 bytes: row, column, channel, the last running fastest."""

import socket

import numpy as np
import numpy.typing as npt

from stf.data.sequences import Splits
from stf.extras import needed
from stf.typing import PathLike

SHAPE = (32, 32, 3)
SEED = 11172018  # the authors' follow-up code splits by RandomState(11172018).permutation


HOST = "www.cs.toronto.edu"  # where the data set is published


class NotAvailableError(RuntimeError):
    """The data set is neither on disk nor to be had from the network."""


def split(images: np.ndarray, held_out_of: tuple[int, int] = (2000, 50000)) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation images: 48,000 and 2,000 of 50,000, in proportion of fewer.

    Args:
        images: the training images, `[examples, ...]`.
        held_out_of: how many are held out for validation, of how many.
    """
    order = np.random.RandomState(SEED).permutation(len(images))
    held_out = round(len(images) * held_out_of[0] / held_out_of[1])
    return images[order[held_out:]], images[order[:held_out]]


def load(data_dir: PathLike | None = None, download: bool = True) -> Splits[npt.NDArray[np.uint8]]:
    """CIFAR-10's images through tensorflow-datasets.

    Args:
        data_dir: its folder; tensorflow-datasets' own unless given.
        download: whether to fetch the data set where the folder does not hold it.

    Returns:
        `Splits`: the paper's 48,000 / 2,000 / 10,000 where the whole set is there, the same proportions of
        the training images where it is not.

    Raises:
        NotAvailableError: it is not there and was not, or could not be, fetched.
    """
    builder = _prepared(data_dir, download)
    train, validation = split(_feature(builder, "train", "image"))
    test = _feature(builder, "test", "image")
    description = (
        f"CIFAR-10 from {builder.data_dir}: {len(train):,} images to train, {len(validation):,} to validate, "
        f"{len(test):,} to test"
    )
    return Splits(train, validation, test, description)


def labels(data_dir: PathLike | None = None, download: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the images of `load` show, in their order: three int32 arrays, training, validation and test; 0 to 9.

    Airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck. Arguments and errors are those of `load`.
    """
    builder = _prepared(data_dir, download)
    return (*split(_feature(builder, "train", "label")), _feature(builder, "test", "label"))


def _prepared(data_dir, download):
    """tensorflow-datasets' builder of the data set, which is there."""
    tfds = needed("tensorflow_datasets")

    builder = tfds.builder("cifar10", data_dir=data_dir, try_gcs=False)
    if not builder.is_prepared():
        if not download:
            raise NotAvailableError(f"CIFAR-10 is not in {builder.data_dir}.")
        try:
            # Asked first, since the downloader would retry for minutes where there is no network.
            socket.create_connection((HOST, 443), timeout=10).close()
            builder.download_and_prepare()
        except Exception as error:  # whatever a network, a proxy or a disk may say
            raise NotAvailableError(
                f"CIFAR-10 is not in {builder.data_dir}, and fetching it failed: {error}"
            ) from error
    return builder


def _feature(builder, name, feature):
    """Images `[examples, 3072]` or labels `[examples]` of a split."""
    tfds = needed("tensorflow_datasets")

    examples = tfds.as_numpy(builder.as_dataset(split=name, shuffle_files=False))
    ordered = sorted(examples, key=lambda example: example["id"])  # that of the published files: tfds' own is a hash's
    found = np.stack([example[feature] for example in ordered])
    return found.reshape(len(found), -1) if feature == "image" else found.astype(np.int32)
