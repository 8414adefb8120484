"""Page formats, torch only: how the tokens of a sealed page become few bytes."""

from pikv.adapters.compressors.affine import Int2, Int4, Int8

__all__ = ["Int2", "Int4", "Int8"]
