"""A few real photographs that scikit-image carries, cut to 32 x 32: training where no data set is at hand."""

import numpy as np

from stf.data.sequences import Splits

SIZE = 32
# Each photograph is in one split only.
TRAIN, VALIDATION, TEST = ("astronaut", "coffee", "hubble_deep_field"), ("chelsea",), ("rocket",)


def cut(photograph):
    """All whole 32 x 32 squares of a photograph `[height, width, 3]`, as sequences `[squares, 3072]`."""
    rows, columns = photograph.shape[0] // SIZE, photograph.shape[1] // SIZE
    whole = photograph[: rows * SIZE, : columns * SIZE, :3]
    squares = whole.reshape(rows, SIZE, columns, SIZE, 3).transpose(0, 2, 1, 3, 4)
    return squares.reshape(rows * columns, -1)


def load():
    """`Splits` of the photographs' squares, split by photograph."""
    import skimage.data

    splits = [
        np.concatenate([cut(getattr(skimage.data, name)()) for name in names]) for names in (TRAIN, VALIDATION, TEST)
    ]
    description = (
        "NOT CIFAR-10: squares of five photographs that scikit-image carries "
        f"({', '.join(TRAIN)} to train: {len(splits[0]):,} squares; {', '.join(VALIDATION)} to validate: "
        f"{len(splits[1]):,}; {', '.join(TEST)} to test: {len(splits[2]):,})"
    )
    return Splits(*splits, description)
