"""Distribution augmentation: images turned, mirrored and recoloured, each with the word of what was done to it."""

import itertools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from stf.layers.validation import positives
from stf.typing import TensorLike


class ImageTransformations:
    """What is done to training images, and told to the model (Jun et al. 2020, "Distribution augmentation").

    A model of `conditions=transformations.sizes` learns the distribution of the images under each transformation, and
    which one it is in; with the conditions all 0, as they are unless given, it is that of the images as they are.
    Other than with plain augmentation nothing wrong is learned, so that strong transformations may be used.

    Examples:
        >>> transformations = stf.data.ImageTransformations((32, 32, 3))
        >>> transformations.sizes
        (2, 4, 6)
        >>> images = np.zeros((100, 3072), np.uint8)
        >>> dataset = stf.data.batches(images, 16, seed=0, transformations=transformations)
        >>> (tokens, conditions), targets = next(iter(dataset))
        >>> conditions.shape
        TensorShape([16, 3])

    Args:
        shape: rows, columns, channels of an image.
        transpositions: whether rows and columns are swapped, or not: 2 values.
        rotations: whether images are turned, after that, by up to three quarters: 4 values.
        colors: whether channels are put into another order: as many values as there are orders.

    Attributes:
        sizes: how many values each condition has, in the order of the arguments; 0 is the image as it is.

    Raises:
        ValueError: nothing is to be done, or an image that is not square is to be turned.
    """

    def __init__(
        self, shape: Sequence[int], transpositions: bool = True, rotations: bool = True, colors: bool = True
    ) -> None:
        self.shape = positives("shape", shape)
        if len(self.shape) != 3:
            raise ValueError(f"shape must be (rows, columns, channels). Received: shape={shape!r}")
        if (transpositions or rotations) and self.shape[0] != self.shape[1]:
            raise ValueError(
                f"shape must have as many rows as columns for transpositions and rotations. Received: shape={shape!r}"
            )
        orders = [*itertools.permutations(range(self.shape[2]))]
        parts = [
            (transpositions, [lambda image, swaps=swaps: image.swapaxes(0, 1) if swaps else image for swaps in (0, 1)]),
            (rotations, [lambda image, turns=turns: np.rot90(image, turns) for turns in range(4)]),
            (colors, [lambda image, order=order: image[..., order] for order in orders]),
        ]
        steps = [of_kind for wanted, of_kind in parts if wanted]
        if not steps:
            raise ValueError("one of transpositions, rotations and colors must be asked for. Received: none")
        self.sizes = tuple(map(len, steps))
        places = np.arange(np.prod(self.shape)).reshape(self.shape)
        found = []
        for chosen in itertools.product(*steps):
            image = places
            for step in chosen:
                image = step(image)
            found.append(image.reshape(-1))
        # [combination of conditions, the last running fastest; position]: where each position's byte comes from.
        self._sources = np.array(found, np.int32)

    def __repr__(self):
        return f"{type(self).__name__}({self.shape}, sizes={self.sizes})"

    def __call__(self, tokens: TensorLike, conditions: TensorLike) -> tf.Tensor:
        """Transformed images.

        Args:
            tokens: `[batch, position]`, images as they are.
            conditions: integers `[batch, condition]`, each below its size.

        Returns:
            A tensor like `tokens`.

        Raises:
            ValueError: tokens or conditions of another shape.
        """
        for name, found, last in (("tokens", tokens, np.prod(self.shape)), ("conditions", conditions, len(self.sizes))):
            if len(found.shape) != 2 or found.shape[1] != last:
                raise ValueError(f"{name} must be [batch, {last}]. Received: {name} of shape {found.shape}")
        combination = 0
        for k, size in enumerate(self.sizes):
            combination = combination * size + tf.cast(conditions[:, k], tf.int32)
        return tf.gather(tokens, tf.gather(self._sources, combination), batch_dims=1)

    def draw(self, count: int, seed: TensorLike) -> tf.Tensor:
        """Conditions, each value as likely as any other: int32 `[count, condition]`.

        Args:
            count: of images.
            seed: two ints, or a tensor of them; the same draws the same.
        """
        draws = tf.random.stateless_uniform([count, len(self.sizes)], seed, 0, 2**30, tf.int32)
        return draws % tf.constant(self.sizes)  # 2**30 is far more than any size: even to one in 10**8
