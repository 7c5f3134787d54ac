"""Attention maps and connectivity for TensorBoard (Figures 2 and 3 of the paper)."""

import keras
import numpy as np
import tensorflow as tf

from stf.callbacks import drawing
from stf.training import steps_taken


class AttentionMaps(keras.callbacks.Callback):
    """Shows where chosen output pixels look, for each layer and head, and what each pattern connects.

    Made from the keys that the pattern gives each chosen query: nothing n x n is computed.

    Args:
        log_dir: TensorBoard's folder.
        tokens: one sequence, integers `[position]`, that the maps are made from.
        image_shape: (rows, columns, channels) of the sequence.
        queries: positions whose maps are shown, each as the model predicts its token; the middle of three rows
            unless given. Key j of a map is what the model has read by then: the tokens before the j-th.
        most_layers: layers shown, evenly spaced.
        every: epochs between two maps; 0 draws at the end of training alone.
    """

    def __init__(self, log_dir, tokens, image_shape=(32, 32, 3), queries=None, most_layers=8, every=1):
        super().__init__()
        self.log_dir = str(log_dir)
        self.tokens = np.asarray(tokens, np.int32)
        self.image_shape = tuple(image_shape)
        if self.tokens.shape != (int(np.prod(self.image_shape)),):
            raise ValueError(
                f"tokens must be one sequence of image_shape={self.image_shape}. "
                f"Received: tokens of shape {self.tokens.shape}"
            )
        n = len(self.tokens)
        if queries is None:
            rows, columns, channels = self.image_shape
            queries = [(int(rows * part) * columns + columns // 2) * channels for part in (1 / 3, 1 / 2, 7 / 8)]
        if not all(0 <= query < n for query in queries):
            raise ValueError(f"queries must be positions from 0 to {n - 1}. Received: queries={queries}")
        self.queries = list(queries)
        self.most_layers = most_layers
        self.every = every
        self._step = None

    def figure(self, layers=None):
        """The maps of the model as it is: uint8 `[height, width, 3]`.

        Args:
            layers: which; `most_layers` of them, evenly spaced, unless given.
        """
        maps = self._maps(self.layers() if layers is None else list(layers))
        columns = len(self.queries) * (1 if layers is not None else self.model.num_heads)
        return self._figure([each for of_layer in maps for each in of_layer], columns)

    def _maps(self, layers):
        """Of each layer the (picture, title) of each head and query, by one pass through the model."""
        found = self.model.attention_weights(self.tokens[None], self.queries, blocks=layers)
        maps = []
        for layer, heads in zip(layers, found, strict=True):
            maps.append([])
            for head, rows in enumerate(heads):
                for query, (keys, weights) in zip(self.queries, rows, strict=True):
                    row, column = divmod(query // self.image_shape[-1], self.image_shape[1])
                    name = _name(self.model.stack.pattern(layer), head)
                    title = f"layer {layer}, head {head}\n{name}\nrow {row}, column {column}"
                    maps[-1].append((drawing.attention_picture(keys, weights[0], query, self.image_shape), title))
        return maps

    @staticmethod
    def _figure(maps, columns):
        """(picture, title) pairs in so many columns, under a heading and over the bar that says what colours mean."""
        pictures, titles = zip(*maps, strict=True)
        figure = drawing.panels(pictures, columns, titles, heading="Where chosen pixels (framed) look")
        text = "root of the weight over the pixel's largest; grey: left out, black: later"
        return drawing.under(figure, drawing.colour_bar(min(figure.shape[1] - 16, 480), text))

    def layers(self):
        """The layers that are shown."""
        count = self.model.stack.num_blocks
        return np.unique(np.linspace(0, count - 1, min(self.most_layers, count)).astype(int)).tolist()

    def connectivity(self):
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
                side = self.image_shape[0] * 6
                matrix = drawing.connectivity_picture(pattern, head, shown, side)
                pictures += [
                    drawing.reach_picture(pattern, head, query, self.image_shape),
                    drawing.enlarge(matrix, max(1, side // len(matrix))),
                ]
                titles += [f"{name}\none pixel's keys", f"the first {shown} queries\ndown, keys across"]
        return drawing.panels(pictures, 4, titles, heading="What the patterns connect")

    def write(self):
        """Writes both figures now."""
        writer = tf.summary.create_file_writer(self.log_dir)
        with writer.as_default(step=steps_taken(self.model.optimizer)):
            layers = self.layers()
            for layer, maps in zip(layers, self._maps(layers), strict=True):  # a card each, so that it can be read
                figure = self._figure(maps, len(self.queries))
                tf.summary.image(f"images/attention maps, layer {layer:03d}", figure[None])
            tf.summary.image("images/connectivity", self.connectivity()[None])
        writer.close()
        self._step = steps_taken(self.model.optimizer)

    def on_epoch_end(self, epoch, logs=None):
        """Writes every so many epochs."""
        if self.every and (epoch + 1) % self.every == 0:
            self.write()

    def on_train_end(self, logs=None):
        """Writes once more, unless it has just been done."""
        if self._step != steps_taken(self.model.optimizer):
            self.write()


def _name(pattern, head):
    name = repr(pattern.for_head(head))
    return name if len(name) <= 26 else name.replace("stride=", "").replace("summary=", "").replace("sub_block=", "")
