"""Page formats, torch only: how the tokens of a sealed page become few bytes."""

from pikv.adapters.compressors.affine import Int2, Int4, Int8
from pikv.adapters.compressors.low_rank import LowRank
from pikv.adapters.compressors.rotated import Rotated
from pikv.core.exact import Exact

__all__ = ["Exact", "Int2", "Int4", "Int8", "LowRank", "Rotated"]
