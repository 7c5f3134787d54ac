"""Text and any other files as streams of bytes; Enwik8 among them."""

import hashlib
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from stf.data.sequences import Splits, Stream, check_held_out
from stf.typing import PathLike

ENWIK8_URL = "https://mattmahoney.net/dc/enwik8.zip"
ENWIK8_ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
ENWIK8_BYTES = 100_000_000
MAPPED = 2**26  # bytes of a file from which on it is not read into memory


def load(path: PathLike, held_out: Sequence[float] = (0.05, 0.05)) -> Splits[Stream]:
    """The bytes of a file, or of all files of a folder and those below it, in the order of their names.

    Files from 64 MiB on are mapped, not read: they may be larger than memory.

    Args:
        path: a file or a folder.
        held_out: share of the bytes, at the end, for validation and for test. A file that lies across the line is cut.

    Returns:
        `Splits` of `Stream`s, a piece for each file.

    Raises:
        FileNotFoundError: there is no such file, or nothing in the folder.
        ValueError: held_out does not fit.
    """
    check_held_out(held_out)
    path = pathlib.Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stream = Stream([_bytes(file) for file in files if file.stat().st_size])
    total = len(stream)
    if not total:
        raise FileNotFoundError(f"no bytes in {path}")
    end = total - round(total * held_out[1])  # of validation
    begin = end - round(total * held_out[0])
    train, validation, test = (stream.part(*ends) for ends in itertools.pairwise([0, begin, end, total]))
    sizes = f"{len(train):,} bytes to train, {len(validation):,} bytes to validate, {len(test):,} bytes to test"
    return Splits(train, validation, test, f"{path}: {sizes}")


def load_enwik8(path: PathLike | None = None) -> Splits[Stream]:
    """Enwik8, the first 100 million bytes of a Wikipedia dump: 90, 5 and 5 million (Section 7.2 of the paper).

    Args:
        path: the unpacked file, or the first bytes of it, which are split in proportion; fetched unless given.

    Returns:
        `Splits` of `Stream`s.

    Raises:
        ValueError: the file has 100 million bytes and is another.
    """
    if path is None:
        import keras

        folder = keras.utils.get_file(origin=ENWIK8_URL, file_hash=ENWIK8_ZIP_SHA256, extract=True)
        path = next(file for file in pathlib.Path(folder).rglob("enwik8") if file.is_file())
    splits = load(path)
    if sum(len(stream) for stream in splits[:3]) == ENWIK8_BYTES:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != ENWIK8_SHA256:
            raise ValueError(f"{path} is not Enwik8, whose sha256 is {ENWIK8_SHA256}. Received: {found}")
    return splits


def _bytes(file):
    """A file's bytes: in memory, or mapped where they are many (each map holds a file open)."""
    if file.stat().st_size < MAPPED:
        return np.fromfile(file, np.uint8)
    return np.memmap(file, np.uint8, "r")
