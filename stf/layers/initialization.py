"""Initial values as the paper has them, and seeds that differ from kernel to kernel."""

from typing import Literal, TypeAlias, get_args

import keras

from stf.layers.validation import positive

Initialization: TypeAlias = Literal["released", "standard_deviation", "variance"]
INITIALIZATIONS = get_args(Initialization)


def paper_initializer(
    fan_in: int,
    scale: float = 1.0,
    init: Initialization = "released",
    seed: int | None = None,
) -> keras.initializers.Initializer:
    """The paper's normal initializer, N(0, 0.125 / sqrt(fan_in)) (Section 6).

    The paper does not say whether the second argument is a standard deviation or a variance.
    The default is neither, but what the authors' follow-up code does (openai's
    distribution_augmentation), a standard deviation of sqrt(0.125 / fan_in): it is the one that is
    known to have trained these models. At fan_in 256 the three give 0.022, 0.0078 and 0.088.

    Args:
        fan_in: number of inputs of the kernel; for an embedding d, times the number of embeddings
            where several are added.
        scale: factor of the standard deviation, 1 / sqrt(2 blocks) where a block writes to the
            residual stream.
        init: "released", "standard_deviation" (0.125 / sqrt(fan_in)) or "variance"
            (sqrt(0.125 / sqrt(fan_in))).
        seed: int or None.

    Returns:
        A `keras.initializers.RandomNormal`.
    """
    if init not in INITIALIZATIONS:
        raise ValueError(f"`init` must be one of {INITIALIZATIONS}. Received: init={init!r}")
    fan_in = positive("fan_in", fan_in)
    stddev = {
        "released": (0.125 / fan_in) ** 0.5,
        "standard_deviation": 0.125 / fan_in**0.5,
        "variance": (0.125 / fan_in**0.5) ** 0.5,
    }[init]
    return keras.initializers.RandomNormal(stddev=stddev * scale, seed=seed)


def seeded(initializer, seed, number):
    """A copy of an initializer for the variable `number` of a layer.

    With a `seed` the copy has one of its own, so that no two variables of one shape start equal.
    Without one it has the initializer's own: random where that is None.
    """
    config = initializer.get_config() if hasattr(initializer, "get_config") else None
    if config is None:  # a plain function
        return initializer
    if seed is not None and "seed" in config:
        config["seed"] = seed + 7919 * number
    return type(initializer).from_config(config)
