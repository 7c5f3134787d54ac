"""Recordings as streams of 8-bit µ-law bytes (Section 7.4 of the paper: 12 kHz)."""

import hashlib
import itertools
import json
import pathlib
import uuid
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stf.data.sequences import Splits, Stream, check_held_out, counts_of
from stf.extras import needed
from stf.typing import PathLike

RATE = 12_000  # samples a second
SUFFIXES = (".wav", ".flac", ".ogg", ".aiff", ".aif")
MU = 255


def encode(wave: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Samples in [-1, 1] as bytes: µ-law companding, then 256 even steps (ITU-T G.711's curve)."""
    wave = np.clip(np.asarray(wave, np.float32), -1, 1)
    companded = np.sign(wave) * np.log1p(MU * np.abs(wave)) / np.log1p(MU)
    return np.round((companded + 1) / 2 * MU).astype(np.uint8)


def decode(tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The samples in [-1, 1], float32, of `encode`'s bytes."""
    companded = np.asarray(tokens, np.float32) / MU * 2 - 1
    return np.sign(companded) * np.expm1(np.abs(companded) * np.log1p(MU)) / MU


def read(path: PathLike, rate: int = RATE) -> npt.NDArray[np.float32]:
    """A recording's samples, float32: mixed to mono, resampled.

    Raises:
        ValueError: it is no recording that can be read, or has samples that are no numbers.
    """
    soundfile, soxr = needed("soundfile"), needed("soxr")

    try:
        wave, found = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} cannot be read as a recording: {error}") from error
    if not np.isfinite(wave).all():
        raise ValueError(f"{path} has samples that are not finite")
    mono = wave.mean(axis=1)
    return mono if found == rate else soxr.resample(mono, found, rate)


def write(path: PathLike, tokens: npt.ArrayLike, rate: int = RATE) -> None:
    """Writes bytes `[position]` as a 16-bit recording."""
    needed("soundfile").write(path, decode(tokens), rate, subtype="PCM_16")


def load(
    folder: PathLike,
    rate: int = RATE,
    held_out: Sequence[float] = (0.05, 0.05),
    seed: int = 0,
    verbose: int = 1,
    cache: PathLike | None = None,
) -> Splits[Stream]:
    """All recordings of a folder and those below it.

    Args:
        folder: has WAV, FLAC, Ogg or AIFF files.
        rate: samples a second that they are resampled to.
        held_out: share of the recordings for validation and for test, at least one each.
        seed: of the order in which recordings are held out.
        verbose: 1 shows a progress bar.
        cache: folder in which the bytes of all recordings are kept as one file, which is mapped, not read: for hours of
            music that are larger than memory, and for starting again without decoding. None keeps them in memory.

    Returns:
        `Splits` of `Stream`s, a piece for each recording: no sequence crosses from one to another.

    Raises:
        FileNotFoundError: there are fewer than three recordings.
        ValueError: a recording cannot be read or has no samples, or `held_out` does not fit.
    """
    tqdm = needed("tqdm").tqdm

    check_held_out(held_out)
    files = sorted(file for file in pathlib.Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(files) < 3:
        raise FileNotFoundError(f"three recordings are needed ({', '.join(SUFFIXES)}). Found {len(files)} in {folder}")
    order = np.random.RandomState(seed).permutation(len(files))
    counts = counts_of(len(files), held_out)
    reading = tqdm(files, "reading recordings", disable=not verbose)
    pieces = [encode(read(file, rate)) for file in reading] if cache is None else _cached(files, rate, cache, reading)
    for file, piece in zip(files, pieces, strict=True):
        if not len(piece):
            raise ValueError(f"{file} has no samples")
    parts = np.split(order, np.cumsum(counts[::-1]))  # test, validation, training
    train, validation, test = (Stream.of([pieces[i] for i in sorted(part)]) for part in parts[::-1])
    sizes = ", ".join(
        f"{len(stream.pieces)} ({len(stream) / rate:,.0f} s) to {use}"
        for stream, use in ((train, "train"), (validation, "validate"), (test, "test"))
    )
    return Splits(train, validation, test, f"{folder}, recordings at {rate:,} Hz: {sizes}")


def _cached(files, rate, cache, reading):
    """The bytes of recordings as parts of one mapped file, which is written where there is none of these recordings."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([rate, stats]).encode()).hexdigest()[:16]
    path = pathlib.Path(cache) / f"recordings-{key}.mulaw"
    borders = path.with_suffix(".npy")
    if not (path.exists() and borders.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.stem}.{uuid.uuid4()}.new")  # beside other workers that may write it too
        lengths = []
        with open(fresh, "wb") as file:
            for recording in reading:
                lengths.append(file.write(encode(read(recording, rate)).tobytes()))
        with open(f"{fresh}.npy", "wb") as file:
            np.save(file, np.cumsum([0, *lengths]))
        pathlib.Path(f"{fresh}.npy").replace(borders)
        fresh.replace(path)
    mapped, places = np.memmap(path, np.uint8, "r"), np.load(borders)
    if len(mapped) != places[-1]:
        raise ValueError(f"{path} has {len(mapped):,} bytes for {places[-1]:,}; delete it, and it is written again")
    return [mapped[low:high] for low, high in itertools.pairwise(places)]
