"""Page formats, torch only: how the tokens of a sealed page become few bytes."""

from pikv.adapters.compressors.affine import Int2, Int4, Int8
from pikv.adapters.compressors.axes import Axes, load_axes, save_axes
from pikv.adapters.compressors.fp8 import Fp8
from pikv.adapters.compressors.leading import Leading
from pikv.adapters.compressors.low_rank import LowRank, UnrotatedLowRank
from pikv.adapters.compressors.rotated import Rotated
from pikv.core.exact import Exact

__all__ = [
    "Axes",
    "Exact",
    "Fp8",
    "Int2",
    "Int4",
    "Int8",
    "Leading",
    "LowRank",
    "Rotated",
    "UnrotatedLowRank",
    "load_axes",
    "save_axes",
]
