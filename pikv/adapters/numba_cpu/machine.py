"""What the processor offers to kernels: how wide its vectors are, how many there are, and which dot products."""

from __future__ import annotations

from typing import Literal

import attrs
import llvmlite.binding as llvm
from numba.core import config

from pikv.adapters.numba_cpu.static import static

Path = Literal["avx512", "portable"]


@static
@attrs.frozen
class Machine:
    """lanes: float32 in a vector. sums: how many vectors of sums an inner loop keeps in registers.

    dots: 1 if vpdpbusd adds the products of 4 pairs of bytes a lane, else 0.
    """

    name: str
    lanes: int
    sums: int
    dots: int


AVX512 = Machine("avx512", lanes=16, sums=16, dots=0)
AVX512_DOTS = Machine("avx512 vnni", lanes=16, sums=16, dots=1)
PORTABLE = Machine("portable", lanes=8, sums=8, dots=0)  # two halves of 4 lanes where vectors are narrower


def machine(path: Path | None = None) -> Machine:
    """The machine that numba compiles for; path: a way to compile for it that is not the best."""
    if path == "portable" or not _has("avx512f", "avx512bw", "avx512vl"):
        return PORTABLE
    return AVX512_DOTS if _has("avx512vnni") else AVX512


def _has(*features: str) -> bool:
    """Whether numba may use these; NUMBA_CPU_FEATURES can take some away."""
    told = config.CPU_FEATURES
    offered = llvm.get_host_cpu_features().flatten() if told is None else told
    return {f"+{feature}" for feature in features} <= set(offered.split(","))
