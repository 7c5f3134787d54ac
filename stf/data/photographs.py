"""A few real photographs that scikit-image carries, cut to 32 x 32: training where no data set is at hand."""

import numpy as np
import numpy.typing as npt

from stf.data.sequences import Splits
from stf.extras import needed

SIZE = 32
# Each photograph is in one split only. Training takes squares that overlap by half, but for the night sky, of which
# there would be too many.
TRAIN = {"astronaut": SIZE // 2, "coffee": SIZE // 2, "hubble_deep_field": SIZE}
VALIDATION, TEST = {"chelsea": SIZE}, {"rocket": SIZE}


def cut(photograph: np.ndarray, step: int = SIZE) -> npt.NDArray[np.uint8]:
    """The 32 x 32 squares of a photograph `[height, width, 3]`, `step` pixels apart, as sequences `[squares, 3072]`."""
    squares = np.lib.stride_tricks.sliding_window_view(photograph[..., :3], (SIZE, SIZE), (0, 1))[::step, ::step]
    return np.ascontiguousarray(squares.transpose(0, 1, 3, 4, 2)).reshape(-1, SIZE * SIZE * 3)


def load() -> Splits[npt.NDArray[np.uint8]]:
    """`Splits` of the photographs' squares, split by photograph."""
    pictures = needed("skimage.data")

    train, validation, test = (
        np.concatenate([cut(getattr(pictures, name)(), step) for name, step in photographs.items()])
        for photographs in (TRAIN, VALIDATION, TEST)
    )
    description = (
        "NOT CIFAR-10: squares of five photographs that scikit-image carries "
        f"({', '.join(TRAIN)} to train: {len(train):,} squares; {', '.join(VALIDATION)} to validate: "
        f"{len(validation):,}; {', '.join(TEST)} to test: {len(test):,})"
    )
    return Splits(train, validation, test, description)
