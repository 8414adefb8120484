"""Numba's kernels pass the backend suite, in whichever vectors, and do not care how many threads there are."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pikv.adapters.compressors import Exact, Int2, Int4, Int8
from pikv.adapters.numba_cpu import NumbaCpu
from pikv.core.ports import Backend, PageCodec
from pikv.testing.backend import BackendConformance, codec

PATHS = [None, "portable"]
AFFINE = (Int8(), Int4(), Int2())


class TestNumbaCpu(BackendConformance):
    """Pages that are stored as they are."""

    def make(self) -> Backend:
        return NumbaCpu()

    def codecs(self) -> Iterable[PageCodec]:
        yield codec(Exact(), page_size=16)
        yield codec(Exact(), page_size=64, key_dim=33, value_dim=96, dtype=torch.bfloat16)
        yield codec(Exact(), page_size=32, key_dim=64, value_dim=128, dtype=torch.float16)


class TestNumbaCpuPortable(TestNumbaCpu):
    """The same without AVX-512."""

    def make(self) -> Backend:
        return NumbaCpu(path="portable")


class TestNumbaCpuAffine(BackendConformance):
    """Codes times digits: the query and the weights have 14 bits."""

    tolerance = 1e-3

    def make(self) -> Backend:
        return NumbaCpu()

    def codecs(self) -> Iterable[PageCodec]:
        yield codec(Int8(), page_size=64, key_dim=32, value_dim=64)
        yield codec(Int4(), page_size=16, key_dim=96, value_dim=32)
        yield codec(Int2(), page_size=32, key_dim=64, value_dim=32)


class TestNumbaCpuAffinePortable(TestNumbaCpuAffine):
    """Codes as floats."""

    tolerance = 1e-5

    def make(self) -> Backend:
        return NumbaCpu(path="portable")
