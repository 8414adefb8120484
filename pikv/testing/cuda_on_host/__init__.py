"""CUDA kernels on a CPU: their sources compiled by a C++ compiler, with a shim for what a GPU has, run block by block.

It shows what a kernel computes, and loads that are not aligned. It cannot show the order in which a GPU's memory is
written, bank conflicts or speed.
"""

from pikv.testing.cuda_on_host.runner import HostRunner, compiler

__all__ = ["HostRunner", "compiler"]
