"""The torch backend passes the suite that it ships with, on every codec there is."""

from __future__ import annotations

from collections.abc import Iterable

import pikv
from pikv.adapters.compressors import Int2, Int4, Int8
from pikv.core.exact import Exact
from pikv.core.missing_backend import MissingBackend
from pikv.core.ports import Backend, PageCodec, PageSelector
from pikv.core.torch_backend import TorchBackend
from pikv.policies import KeyCodes, Quest
from pikv.testing.backend import CPU, BackendConformance, codec
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


def test_a_missing_backend_serves_nothing_and_is_described():
    """It stands before torch, which serves; the description says how to get it, and is silent where nothing lacks."""
    absent = MissingBackend(missing="fast", remedy="install it")
    each = codec(Exact())
    assert absent.attend(each, CPU) is None
    assert absent.choose(Quest(), each, CPU) is None
    assert absent.seal(each, None, CPU) is None
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=32)
    described = pikv.PiKVCache(model, pikv.RuntimeConfig(backends=(absent, TorchBackend()))).describe()
    assert described.parts["not installed"] == "fast is missing: install it"
    assert described.steps["seal, layers 0"] == "torch"
    assert "not installed" not in pikv.PiKVCache(model, pikv.RuntimeConfig()).describe().parts


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
