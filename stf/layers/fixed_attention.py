"""Fixed attention."""

from typing import Any, Literal

import keras

from stf.layers.attention import SparseAttention
from stf.patterns import Fixed, OwnBlock, PerHead, Summary

MODES = ("merged", "block", "summary", "multihead")


def fixed_pattern(stride, summary, mode):
    """The pattern of a mode of `FixedAttention`."""
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
    block, columns = OwnBlock(stride), Summary(stride, summary)
    return {
        "merged": Fixed(stride, summary),
        "block": block,
        "summary": columns,
        "multihead": PerHead([block, columns]),
    }[mode]


@keras.saving.register_keras_serializable(package="stf")
class FixedAttention(SparseAttention):
    """Fixed attention (Section 4.3 of Child et al. 2019): the own block, and all blocks' summaries.

    For data without a period, as text. Each head has a sub-block of summary columns of its own.

    Examples:
        >>> layer = stf.layers.FixedAttention(num_heads=8, key_dim=64, stride=128, summary=32)
        >>> layer(tf.zeros([1, 1024, 512])).shape
        TensorShape([1, 1024, 512])

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's query and key.
        stride: l, the length of a block, 128 or 256 in the paper.
        summary: c, the number of summary columns of a block, 8, 16 or 32 in the paper.
        mode: "merged": each head attends to both sets (Eq. 7); "block" or "summary": to one, for
            layers used in turn (Eq. 6); "multihead": even heads to the first, odd heads to the
            second (Eq. 8).
        **kwargs: all else that `SparseAttention` takes but `pattern`.

    Call arguments, returns and errors: those of `SparseAttention`.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        stride: int,
        summary: int,
        mode: Literal["merged", "block", "summary", "multihead"] = "merged",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, fixed_pattern(stride, summary, mode), **kwargs)
        self.stride = int(stride)
        self.summary = int(summary)
        self.mode = mode

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["pattern"]
        return {**config, "stride": self.stride, "summary": self.summary, "mode": self.mode}
