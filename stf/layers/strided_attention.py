"""Strided attention."""

from typing import Any, Literal

import keras

from stf.layers.attention import SparseAttention
from stf.patterns import Local, PerHead, Strided

MODES = ("merged", "local", "strided", "multihead")


def strided_pattern(stride, mode):
    """The pattern of a mode of `StridedAttention`."""
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
    strided, local = Strided(stride), Local(stride)  # in this order: an error names `stride`
    return {
        "merged": local | strided,
        "local": local,
        "strided": strided,
        "multihead": PerHead([local, strided]),
    }[mode]


@keras.saving.register_keras_serializable(package="stf")
class StridedAttention(SparseAttention):
    """Strided attention (Section 4.3 of Child et al. 2019): the last l positions, and every l-th.

    For data with a period, as the rows of an image or the beats of music.

    Examples:
        >>> stf.layers.StridedAttention(num_heads=8, key_dim=64, stride=128)(tf.zeros([1, 1024, 512])).shape
        TensorShape([1, 1024, 512])

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's query and key.
        stride: l, close to the square root of the length.
        mode: "merged": each head attends to both sets (Eq. 7); "local" or "strided": to one, for
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
        mode: Literal["merged", "local", "strided", "multihead"] = "merged",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, strided_pattern(stride, mode), **kwargs)
        self.stride = int(stride)
        self.mode = mode

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["pattern"]
        return {**config, "stride": self.stride, "mode": self.mode}
