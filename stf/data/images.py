"""Images of a folder, of any size, as byte sequences: row, column, channel, the last running fastest."""

import pathlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stf.data.sequences import Splits, check_held_out, counts_of
from stf.extras import needed
from stf.typing import PathLike

GIANT = 2**25  # pixels
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def read(path: PathLike, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    """An image as uint8 `[rows * columns * 3]`: scaled until it just covers the shape, its middle cut out.

    Raises:
        ValueError: it is no image that can be read whole.
    """
    Image, ImageOps = needed("PIL.Image"), needed("PIL.ImageOps")  # noqa: N806

    try:
        with Image.open(path) as image:
            # Of a giant a whole fraction first: the conversions below each take a copy.
            times = min(image.width // (4 * shape[1]), image.height // (4 * shape[0]))
            if image.width * image.height > GIANT and times > 1:
                image = image.convert("RGB") if image.mode in ("1", "P") else image
                image = image.reduce(times)
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(upright, (shape[1], shape[0]), Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return np.asarray(fitted, np.uint8).reshape(-1)


def load(
    folder: PathLike,
    shape: Sequence[int] = (64, 64, 3),
    held_out: Sequence[float] = (0.05, 0.05),
    seed: int = 0,
    verbose: int = 1,
) -> Splits[npt.NDArray[np.uint8]]:
    """All images of a folder and those below it.

    Args:
        folder: has images that Pillow reads.
        shape: rows, columns and 3.
        held_out: share of the images for validation and for test, at least one each.
        seed: of the order in which images are held out.
        verbose: 1 shows a progress bar.

    Returns:
        `Splits`, uint8 `[images, rows * columns * 3]`.

    Raises:
        FileNotFoundError: there are fewer than three images.
        ValueError: the shape or `held_out` does not fit, or an image cannot be read.
    """
    tqdm = needed("tqdm").tqdm

    check_held_out(held_out)
    if len(shape) != 3 or min(shape) < 1 or shape[2] != 3:
        raise ValueError(f"shape must be (rows, columns, 3). Received: shape={shape}")
    files = sorted(file for file in pathlib.Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(files) < 3:
        raise FileNotFoundError(f"three images are needed ({', '.join(SUFFIXES)}). Found {len(files)} in {folder}")
    order = np.random.RandomState(seed).permutation(len(files))
    images = np.stack([read(file, shape) for file in tqdm(files, "reading images", disable=not verbose)])
    counts = counts_of(len(files), held_out)
    test, validation, train = np.split(order, np.cumsum(counts[::-1]))
    description = (
        f"{folder}, images of {shape[0]} x {shape[1]}: {len(train):,} to train, {len(validation):,} to validate, "
        f"{len(test):,} to test"
    )
    return Splits(images[train], images[validation], images[test], description)
