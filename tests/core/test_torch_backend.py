"""The torch backend passes the suite that it ships with, on every codec there is."""

from __future__ import annotations

from collections.abc import Iterable

from pikv.adapters.compressors import Int2, Int4, Int8
from pikv.core.ports import Backend, PageCodec, PageSelector
from pikv.core.torch_backend import TorchBackend
from pikv.policies import KeyCodes, Quest
from pikv.testing.backend import BackendConformance, codec
from pikv.testing.page_kernels import PageKernelConformance


class TestTorchBackend(BackendConformance):
    """The shipped suite."""

    def make(self) -> Backend:
        return TorchBackend()

    def codecs(self) -> Iterable[PageCodec]:
        yield from super().codecs()
        for compressor in (Int8(), Int4(), Int2()):
            for page_size in (16, 64):
                yield codec(compressor, page_size=page_size)


class TestTorchPageKernels(PageKernelConformance):
    """The shipped suite."""

    def make(self) -> Backend:
        return TorchBackend()

    def codecs(self) -> Iterable[PageCodec]:
        yield from super().codecs()
        yield codec(Int4(), page_size=32)

    def selectors(self) -> Iterable[PageSelector]:
        yield from super().selectors()
        yield Quest(pages=2)
        yield KeyCodes(pages=20, mass=0.8)
