"""Kernels for NVIDIA GPUs that are written to be read; where there is no GPU, numba's simulator runs them."""

from pikv.adapters.numba_cuda.backend import NumbaCuda

__all__ = ["NumbaCuda"]
