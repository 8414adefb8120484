"""Attention on a CPU by compiled kernels that read pages where they lie, as they are encoded."""

from pikv.adapters.numba_cpu.backend import NumbaCpu

__all__ = ["NumbaCpu"]
