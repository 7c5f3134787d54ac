"""Pictures as arrays: grids of images, labelled panels, attention maps, connectivity."""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stf.extras import needed
from stf.patterns import lower
from stf.patterns.pattern import Pattern

BACKGROUND, INK = (24, 24, 28), (235, 235, 235)


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """`image` `[rows, columns, 3]`, each pixel a square of `factor` pixels."""
    return np.repeat(np.repeat(image, factor, 0), factor, 1)


def grid(
    images: npt.ArrayLike, columns: int | None = None, factor: int = 4, gap: int = 4, caption: str | None = None
) -> npt.NDArray[np.uint8]:
    """Images `[count, rows, columns, channels]` side by side in one, enlarged, under a caption; uint8 RGB."""
    images = np.asarray(images, np.uint8)
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, -1)
    columns = columns or int(np.ceil(np.sqrt(2 * len(images))))
    return panels([enlarge(image, factor) for image in images], columns, gap=gap, heading=caption)


def panels(
    pictures: Sequence[np.ndarray],
    columns: int,
    titles: Sequence[str] | None = None,
    gap: int = 8,
    heading: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Pictures of one size in rows of `columns`, each under its title, all under a heading; uint8 RGB."""
    height, width = pictures[0].shape[:2]
    font = _pillow("ImageFont").load_default(size=13)
    lines = max((title.count("\n") + 1 for title in titles), default=0) if titles else 0
    label = 17 * lines
    top = 30 if heading else 0
    rows = -(-len(pictures) // columns)
    heading_font = _pillow("ImageFont").load_default(size=16)
    wide = columns * (width + gap) + gap
    if heading:  # all of it is to be read
        wide = max(wide, int(heading_font.getlength(heading)) + 2 * gap)
    canvas = _pillow("Image").new("RGB", (wide, top + rows * (height + label + gap) + gap), BACKGROUND)
    draw = _pillow("ImageDraw").Draw(canvas)
    if heading:
        draw.text((gap, 7), heading, INK, heading_font)
    for index, picture in enumerate(pictures):
        x = gap + index % columns * (width + gap)
        y = top + gap + index // columns * (height + label + gap)
        if titles:
            draw.multiline_text((x, y), titles[index], INK, font, spacing=3)
        canvas.paste(_pillow("Image").fromarray(np.asarray(picture, np.uint8)), (x, y + label))
    return np.asarray(canvas)


def heat(values: np.ndarray) -> npt.NDArray[np.uint8]:
    """Values in [0, 1] as colours from dark violet over orange to white, `[..., 3]`."""
    stops = np.array([(38, 20, 60), (120, 28, 109), (207, 68, 70), (250, 155, 40), (252, 255, 200)], float)
    at = np.clip(np.nan_to_num(values), 0, 1) * (len(stops) - 1)
    low = np.minimum(at.astype(int), len(stops) - 2)
    part = (at - low)[..., None]
    return (stops[low] * (1 - part) + stops[low + 1] * part).astype(np.uint8)


def colour_bar(width: int, text: str, height: int = 12) -> npt.NDArray[np.uint8]:
    """What the colours of `heat` stand for: from 0 to 1, and a line of text under them; uint8 `[rows, width, 3]`."""
    bar = np.repeat(heat(np.linspace(0, 1, width))[None], height, 0)
    label = _pillow("Image").new("RGB", (width, 20), BACKGROUND)
    _pillow("ImageDraw").Draw(label).text((0, 3), text, INK, _pillow("ImageFont").load_default(size=13))
    return np.concatenate([bar, np.asarray(label)])


def under(picture: np.ndarray, strip: np.ndarray, gap: int = 8) -> np.ndarray:
    """A picture with a strip of at most its width below it, on the background."""
    room = np.full((strip.shape[0] + gap, picture.shape[1], 3), BACKGROUND, np.uint8)
    room[: strip.shape[0], gap : gap + strip.shape[1]] = strip[:, : picture.shape[1] - gap]
    return np.concatenate([picture, room])


def attention_picture(
    keys: npt.ArrayLike, weights: npt.ArrayLike, query: int, image_shape: Sequence[int], factor: int = 6
) -> np.ndarray:
    """Weights of one query over the image, as in the paper's Figure 2.

    A pixel has the sum over its channels, by the root of its share of the largest, so that small weights
    show. What lies after the query is black, keys that the pattern leaves out are grey, the query's pixel
    has a frame.

    Args:
        keys: positions that the query attends to.
        weights: their weights.
        query: its position.
        image_shape: (rows, columns, channels).
    """
    rows, columns, channels = image_shape
    total, seen = np.zeros(rows * columns), np.zeros(rows * columns, bool)
    np.add.at(total, np.asarray(keys) // channels, weights)
    seen[np.asarray(keys) // channels] = True
    picture = np.where(seen[:, None], heat(np.sqrt(total / max(total.max(), 1e-12))), 70).astype(np.uint8)
    picture[query // channels + 1 :] = 0
    picture = enlarge(picture.reshape(rows, columns, 3), factor)
    return framed(picture, query // channels, columns, factor)


def text_picture(text: npt.ArrayLike, colours: np.ndarray, query: int, cell: tuple[int, int] = (15, 10)) -> np.ndarray:
    """Bytes in cells of given colours, the query's framed; a line's end is a ring, what is no ASCII a dot.

    Args:
        text: bytes, as many as are to be written.
        colours: of the cells, uint8 `[rows, columns, 3]`.
        query: the cell that has the frame.
        cell: its height and width.
    """
    height, width = cell
    image = _pillow("Image").fromarray(np.repeat(np.repeat(colours.astype(np.uint8), height, 0), width, 1))
    draw, font = _pillow("ImageDraw").Draw(image), _pillow("ImageFont").load_default(size=13)
    for index, byte in enumerate(np.asarray(text).tolist()):
        row, column = divmod(index, colours.shape[1])
        letter = chr(byte) if 32 <= byte < 127 else "\u00b0" if byte == 10 else "\u00b7"
        ink = (20, 20, 20) if colours[row, column].astype(int).sum() > 400 else INK
        draw.text(((column + 0.5) * width, row * height), letter, ink, font, anchor="ma")
    row, column = divmod(query, colours.shape[1])
    draw.rectangle(
        (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1),
        outline=(90, 220, 255),
        width=2,
    )
    return np.asarray(image)


def wave_picture(tokens: npt.ArrayLike, colours: np.ndarray, query: int, height: int) -> np.ndarray:
    """The wave of µ-law bytes, each pixel from its least to its greatest sample, before columns of given colours.

    Args:
        tokens: bytes `[position]`.
        colours: of the picture's columns, `[width, 3]`.
        query: the column that has the blue line.
        height: of the picture.
    """
    width = len(colours)
    picture = np.repeat(colours[None].astype(np.uint8), height, 0)
    wave = (1 - np.asarray(tokens) / 255) * (height - 1)  # as it is heard: quiet near the middle, by its logarithm
    borders = np.arange(width + 1) * len(wave) // width
    for column in range(width):
        part = wave[borders[column] : max(borders[column + 1], borders[column] + 1)]
        low, high = int(part.min()), int(np.ceil(part.max()))
        bright = colours[column].astype(int).sum() > 400
        picture[low : high + 1, column] = (20, 20, 20) if bright else INK
    picture[:, query] = (90, 220, 255)
    return picture


def framed(picture: np.ndarray, pixel: int, columns: int, factor: int) -> np.ndarray:
    """A frame around one pixel of an enlarged picture."""
    y, x = pixel // columns * factor, pixel % columns * factor
    image = _pillow("Image").fromarray(picture)
    _pillow("ImageDraw").Draw(image).rectangle((x - 1, y - 1, x + factor, y + factor), outline=(90, 220, 255), width=2)
    return np.asarray(image)


def connectivity_picture(pattern: Pattern, head: int, positions: int, size: int = 192) -> np.ndarray:
    """Which keys (across) each query (down) attends to, as the matrices of the paper's Figure 3.

    Where there are more positions than `size` pixels, a pixel is coloured if any of its queries attends to any of its
    keys: lines stay lines.
    """
    size = min(size, positions)
    picture = np.full((size, size, 3), 255, np.uint8)
    picture[np.triu_indices(size, 1)] = (200, 200, 204)
    for query in range(positions):
        picture[query * size // positions, pattern.keys(query, head) * size // positions] = (120, 170, 235)
    picture[np.diag_indices(size)] = (20, 60, 150)
    return picture


def telling_positions(pattern: Pattern, head: int, positions: int, periods: int = 4) -> int:
    """How many of the first positions show a pattern: so many of its longest stride, window or block."""
    records = lower(pattern.for_head(head), 1).components
    longest = max((records[begin + 1] for begin in range(0, len(records), 6)), default=0)
    return min(positions, max(periods * int(longest), 64))


def reach_picture(pattern: Pattern, head: int, query: int, image_shape: Sequence[int], factor: int = 6) -> np.ndarray:
    """Which pixels one query attends to, over the image, as the small pictures of the paper's Figure 3."""
    rows, columns, channels = image_shape
    picture = np.full((rows * columns, 3), 255, np.uint8)
    picture[query // channels + 1 :] = (200, 200, 204)
    picture[pattern.keys(query, head) // channels] = (120, 170, 235)
    picture[query // channels] = (20, 60, 150)
    return enlarge(picture.reshape(rows, columns, 3), factor)


@functools.cache
def _pillow(module):
    """A module of Pillow, which only pictures need."""
    return needed(f"PIL.{module}")
