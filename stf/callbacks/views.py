"""How a sequence is shown, and what one of its queries attends to in it: as an image, a text, a sound."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from stf.callbacks import drawing
from stf.layers.validation import positives
from stf.patterns.pattern import Pattern


class ImageView:
    """Weights over the image, as in the paper's Figure 2.

    Args:
        image_shape: (rows, columns, channels) of the sequence.
    """

    heading = "Where chosen pixels (framed) look"
    legend = "root of the weight over the pixel's largest; grey: left out, black: later"
    reached = "one pixel's keys"
    heads_share_a_card = True

    def __init__(self, image_shape: Sequence[int] = (32, 32, 3)) -> None:
        self.image_shape = positives("image_shape", image_shape)
        if len(self.image_shape) != 3:
            raise ValueError(f"image_shape must be (rows, columns, channels). Received: image_shape={image_shape!r}")

    def check(self, tokens: np.ndarray) -> None:
        """Raises ValueError where tokens `[position]` are no such sequence."""
        if tokens.shape != (int(np.prod(self.image_shape)),):
            raise ValueError(
                f"tokens must be one sequence of image_shape={self.image_shape}. "
                f"Received: tokens of shape {tokens.shape}"
            )

    def queries(self, positions: int) -> list[int]:
        """Those that are shown unless others are asked for: the middle of three rows."""
        rows, columns, channels = self.image_shape
        return [(int(rows * part) * columns + columns // 2) * channels for part in (1 / 3, 1 / 2, 7 / 8)]

    def columns(self, queries: int) -> int:
        """Pictures side by side in a card, of so many queries."""
        return queries

    def place(self, tokens: np.ndarray, query: int) -> str:
        """A query's place, in words."""
        row, column = divmod(query // self.image_shape[-1], self.image_shape[1])
        return f"row {row}, column {column}"

    def attention(self, tokens: np.ndarray, keys: np.ndarray, weights: np.ndarray, query: int) -> np.ndarray:
        """The picture of what a query attends to."""
        return drawing.attention_picture(keys, weights, query, self.image_shape)

    def reach(self, pattern: Pattern, head: int, query: int) -> np.ndarray:
        """The picture of which positions a query's pattern has."""
        return drawing.reach_picture(pattern, head, query, self.image_shape)


class _OneDimensionalView:
    """What text and sound share: positions in rows of the model's matrix, one query, at nine tenths, cards of one head.

    Args:
        position_shape: (rows, columns) of the model's positions.
    """

    heads_share_a_card = False  # TensorBoard opens cards small: what has words in it must be small too

    def __init__(self, position_shape):
        self.position_shape = positives("position_shape", position_shape)
        if len(self.position_shape) != 2:
            raise ValueError(f"position_shape must be (rows, columns). Received: position_shape={position_shape!r}")

    def check(self, tokens):
        """Raises ValueError where tokens `[position]` are no such sequence."""
        if tokens.ndim != 1 or not 2 <= len(tokens) <= np.prod(self.position_shape):
            raise ValueError(
                f"tokens must be one sequence of 2 to {np.prod(self.position_shape)} positions. "
                f"Received: tokens of shape {tokens.shape}"
            )

    def queries(self, positions):
        """That which is shown unless others are asked for."""
        return [positions * 9 // 10]

    def columns(self, queries):
        """Pictures side by side in a card."""
        return 1

    def reach(self, pattern, head, query):
        """The picture of which positions a query's pattern has, in rows of the matrix."""
        return drawing.reach_picture(
            pattern, head, query, (*self.position_shape, 1), max(1, 192 // max(self.position_shape))
        )


class TextView(_OneDimensionalView):
    """Weights over the last lines of bytes before a query, a cell for each.

    A key stands for the byte that the model has read there, the one before it: that one's cell is coloured.

    Args:
        position_shape: (rows, columns) of the model's positions.
        columns, rows: bytes of a line, and lines, that are shown.
    """

    heading = "Where the byte that comes next (framed) looks"
    legend = "root of the weight over the largest; grey: left out; \u00b0 the end of a line"
    reached = "one byte's keys"

    def __init__(self, position_shape: Sequence[int], columns: int = 40, rows: int = 8) -> None:
        super().__init__(position_shape)
        self.shape = positives("columns and rows", (rows, columns))

    def _first(self, query):
        """The first byte that is shown."""
        rows, columns = self.shape
        return max(0, query + 1 - rows * columns)

    def place(self, tokens: np.ndarray, query: int) -> str:
        return f"byte {query:,}, of which {self._first(query):,} are not shown"

    def attention(self, tokens: np.ndarray, keys: np.ndarray, weights: np.ndarray, query: int) -> np.ndarray:
        rows, columns = self.shape
        first, read = self._first(query), np.asarray(keys) - 1  # key j has read byte j - 1
        total, seen = np.zeros(rows * columns), np.zeros(rows * columns, bool)
        shown = read >= first
        np.add.at(total, read[shown] - first, np.asarray(weights)[shown])
        seen[read[shown] - first] = True
        colours = np.where(seen[:, None], drawing.heat(np.sqrt(total / max(np.max(weights), 1e-12))), 70)
        colours[query - first :] = 0
        return drawing.text_picture(tokens[first : query + 1], colours.reshape(rows, columns, 3), query - first)


class WaveView(_OneDimensionalView):
    """Weights behind the wave of a sound, from its beginning to its end.

    Args:
        position_shape: (rows, columns) of the model's positions.
        size: (height, width) of a picture, in pixels.
    """

    heading = "Where the sample that comes next (blue line) looks"
    legend = "root of the weight of a pixel's samples over the largest; grey: left out, black: later"
    reached = "one sample's keys"

    def __init__(self, position_shape: Sequence[int], size: tuple[int, int] = (80, 400)) -> None:
        super().__init__(position_shape)
        self.size = positives("size", size)

    def place(self, tokens: np.ndarray, query: int) -> str:
        return f"sample {query:,} of {len(tokens):,}"

    def attention(self, tokens: np.ndarray, keys: np.ndarray, weights: np.ndarray, query: int) -> np.ndarray:
        height, width = self.size
        total, seen = np.zeros(width), np.zeros(width, bool)
        column = np.asarray(keys) * width // len(tokens)
        np.add.at(total, column, weights)
        seen[column] = True
        colours = np.where(seen[:, None], drawing.heat(np.sqrt(total / max(total.max(), 1e-12))), 70)
        at = query * width // len(tokens)
        colours[at + 1 :] = 0
        return drawing.wave_picture(tokens, colours, at, height)


View: TypeAlias = ImageView | TextView | WaveView


def view_of(position_shape: Sequence[int], kind: Literal["image", "text", "audio"]) -> View:
    """The view of a model's positions: of "image", "text" or "audio"."""
    views = {"image": ImageView, "text": TextView, "audio": WaveView}
    if kind not in views:
        raise ValueError(f"kind must be one of {', '.join(views)}. Received: kind={kind!r}")
    return views[kind](position_shape)
