"""Attention maps and connectivity for TensorBoard (Figures 2 and 3 of the paper)."""

from collections.abc import Iterable, Sequence

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from stf.callbacks import drawing
from stf.callbacks.views import ImageView, View
from stf.extras import needed
from stf.training import steps_taken
from stf.typing import Logs, PathLike, TensorLike

MOST_COLUMNS = 6  # of a figure that is not a card


class AttentionMaps(keras.callbacks.Callback):
    """Shows where chosen queries look, for each layer and head, and what each pattern connects.

    Made from the keys that the pattern gives each chosen query: nothing n x n is computed.

    Args:
        log_dir: TensorBoard's folder.
        tokens: one sequence, integers `[position]`, that the maps are made from.
        image_shape: (rows, columns, channels) of the sequence, where it is an image.
        queries: positions whose maps are shown, each as the model predicts its token; a few unless given. Key j of a
            map is what the model has read by then: the tokens before the j-th.
        most_layers: layers shown, evenly spaced, unless `layers` says which.
        every: epochs between two maps; 0 draws at the end of training alone.
        view: how the sequence is shown: `stf.callbacks.views.TextView`, `WaveView` for text and sound; an image unless
            given.
        layers: the layers that are shown.
        heads: the heads that are shown; all unless given.
    """

    def __init__(
        self,
        log_dir: PathLike,
        tokens: TensorLike,
        image_shape: Sequence[int] = (32, 32, 3),
        queries: Iterable[int] | None = None,
        most_layers: int = 8,
        every: int = 1,
        view: View | None = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        needed("tensorboard")  # without it TensorFlow writes no pictures
        self.log_dir = str(log_dir)
        self.tokens = np.asarray(tokens, np.int32)
        self.view = ImageView(image_shape) if view is None else view
        self.view.check(self.tokens)
        n = len(self.tokens)
        self.queries = list(self.view.queries(n) if queries is None else queries)
        if not self.queries or not all(0 <= query < n for query in self.queries):
            raise ValueError(f"queries must be positions from 0 to {n - 1}. Received: queries={queries}")
        self.most_layers = most_layers
        self.every = every
        self._layers, self._heads = layers, heads
        self._step: int | None = None

    def set_model(self, model: keras.Model) -> None:
        """Takes the model, of which the chosen layers and heads must be."""
        super().set_model(model)
        for name, chosen, count in (
            ("layers", self._layers, model.num_blocks),
            ("heads", self._heads, model.num_heads),
        ):
            if chosen is not None and (not len(chosen) or not all(0 <= index < count for index in chosen)):
                raise ValueError(f"{name} must be from 0 to {count - 1}. Received: {name}={chosen}")

    def figure(self, layers: Iterable[int] | None = None) -> npt.NDArray[np.uint8]:
        """The maps of the model as it is: uint8 `[height, width, 3]`.

        Args:
            layers: which; those of the callback unless given.
        """
        maps = self._maps(self.layers() if layers is None else list(layers))
        columns = self.view.columns(len(self.queries))
        if layers is None:
            columns *= max(
                1, min(len(self.heads()), MOST_COLUMNS // columns)
            )  # a line for each layer, if there is room
        return self._figure([each for of_layer in maps for each in of_layer], columns)

    def _maps(self, layers):
        """Of each layer the (picture, title) of each head and query, by one pass through the model."""
        found = self.model.attention_weights(self.tokens[None], self.queries, blocks=layers)
        maps = []
        for layer, heads in zip(layers, found, strict=True):
            maps.append([])
            for head in self.heads():
                for query, (keys, weights) in zip(self.queries, heads[head], strict=True):
                    name = _name(self.model.stack.pattern(layer), head)
                    title = f"layer {layer}, head {head}\n{name}\n{self.view.place(self.tokens, query)}"
                    maps[-1].append((self.view.attention(self.tokens, keys, weights[0], query), title))
        return maps

    def _cards(self, maps):
        """(what a card's name adds, its pictures) of a layer's pictures."""
        if self.view.heads_share_a_card:
            return [("", maps)]
        count = len(self.queries)
        return [(f", head {head}", maps[k * count : (k + 1) * count]) for k, head in enumerate(self.heads())]

    def _figure(self, maps, columns):
        """(picture, title) pairs in so many columns, under a heading and over the bar that says what colours mean."""
        pictures, titles = zip(*maps, strict=True)
        figure = drawing.panels(pictures, min(columns, len(pictures)), titles, heading=self.view.heading)
        return drawing.under(figure, drawing.colour_bar(min(figure.shape[1] - 16, 480), self.view.legend))

    def layers(self) -> list[int]:
        """The layers that are shown."""
        if self._layers is not None:
            return list(self._layers)
        count = self.model.stack.num_blocks
        return np.unique(np.linspace(0, count - 1, min(self.most_layers, count)).astype(int)).tolist()

    def heads(self) -> list[int]:
        """The heads that are shown."""
        return list(range(self.model.num_heads) if self._heads is None else self._heads)

    def connectivity(self) -> npt.NDArray[np.uint8]:
        """What each distinct pattern connects: uint8 `[height, width, 3]`."""
        pictures, titles, seen = [], [], set()
        query, n = self.queries[len(self.queries) // 2], len(self.tokens)
        for whole in self.model.patterns:
            for head in range(self.model.num_heads):
                pattern = whole.for_head(head)
                if pattern in seen:
                    continue
                seen.add(pattern)
                name, shown = _name(whole, head), drawing.telling_positions(pattern, head, n)
                reach = self.view.reach(pattern, head, query)
                matrix = drawing.connectivity_picture(pattern, head, shown, len(reach))
                pictures += [reach, drawing.enlarge(matrix, max(1, len(reach) // len(matrix)))]
                titles += [f"{name}\n{self.view.reached}", f"the first {shown} queries\ndown, keys across"]
        return drawing.panels(pictures, 2, titles, heading="What the patterns connect")

    def write(self) -> None:
        """Writes both figures now."""
        writer = tf.summary.create_file_writer(self.log_dir)
        with writer.as_default(step=steps_taken(self.model.optimizer)):
            layers = self.layers()
            for layer, maps in zip(layers, self._maps(layers), strict=True):  # cards as small as they open
                for name, pictures in self._cards(maps):
                    figure = self._figure(pictures, self.view.columns(len(self.queries)))
                    tf.summary.image(f"images/attention maps, layer {layer:03d}{name}", figure[None])
            tf.summary.image("images/connectivity", self.connectivity()[None])
        writer.close()
        self._step = steps_taken(self.model.optimizer)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Writes every so many epochs."""
        if self.every and (epoch + 1) % self.every == 0:
            self.write()

    def on_train_end(self, logs: Logs = None) -> None:
        """Writes once more, unless it has just been done."""
        if self._step != steps_taken(self.model.optimizer):
            self.write()


def _name(pattern, head):
    name = repr(pattern.for_head(head))
    return name if len(name) <= 26 else name.replace("stride=", "").replace("summary=", "").replace("sub_block=", "")
