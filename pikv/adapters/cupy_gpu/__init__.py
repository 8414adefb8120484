"""CUDA kernels that read pages where they lie, as they are encoded, on torch's memory and stream."""

from pikv.adapters.cupy_gpu.backend import CupyGpu
from pikv.adapters.cupy_gpu.tier import PinnedTier

__all__ = ["CupyGpu", "PinnedTier"]
