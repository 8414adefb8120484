"""The readable GPU kernels pass the suites of every backend, in numba's simulator or on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    NUMBERS,
    check_decodes_as_torch,
    check_refuses_what_float16_cannot_hold,
    check_seals_as_torch,
    one_page,
)

import pikv
from pikv.adapters.compressors import Int2, Int4, Int8
from pikv.core.exact import Exact
from pikv.core.ports import Backend, PageCodec, Pages, PageSelector
from pikv.core.tables import all_live
from pikv.policies import Quest
from pikv.testing.backend import CPU, BackendConformance, codec, oracle
from pikv.testing.on_device import OnDevice
from pikv.testing.page_kernels import PageKernelConformance

numba_cuda = pytest.importorskip("pikv.adapters.numba_cuda", reason="numba is not installed")
if not numba_cuda.backend.SIMULATED and not torch.cuda.is_available():
    pytest.skip("a GPU is missing, and the simulator: NUMBA_ENABLE_CUDASIM is 0", allow_module_level=True)

# A simulated thread is one of Python's, so shapes are as small as they can be, and examples fewer than elsewhere.
FEW = settings(max_examples=max(1, settings.default.max_examples // 6))


def under_test() -> Backend:
    """In the simulator, whose memory is the CPU's, or on a GPU."""
    return OnDevice(numba_cuda.NumbaCuda(), CPU if numba_cuda.backend.SIMULATED else torch.device("cuda"))


class TestAttention(BackendConformance):
    """The shipped suite: dense and encoded."""

    def make(self) -> Backend:
        return under_test()

    def codecs(self) -> Iterable[PageCodec]:
        yield codec(Exact(), group=1, key_dim=3, value_dim=2, softcap=5.0)
        yield codec(Int8(), group=1, key_dim=4, value_dim=4, dtype=torch.bfloat16)


class TestPages(PageKernelConformance):
    """The shipped suite for choosing and sealing."""

    def make(self) -> Backend:
        return under_test()

    def codecs(self) -> Iterable[PageCodec]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield codec(Exact(), key_dim=3, value_dim=5, dtype=dtype)
            yield codec(Int4(), key_dim=8, value_dim=4, dtype=dtype)
        yield codec(Int2(), page_size=32, key_dim=16, value_dim=8)
        yield codec(Int8(), key_dim=2, value_dim=3)

    def selectors(self) -> Iterable[PageSelector]:
        yield Quest(pages=3)


@st.composite
def cases(draw):
    """A codec, and for pages of any number in any order, some of them dead in part, queries and a window."""
    compressor = draw(st.sampled_from([Exact(), Int8(), Int4(), Int2()]))
    each = codec(
        compressor,
        page_size=draw(st.sampled_from([16, 32])),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        key_dim=draw(st.integers(1, 9)),
        value_dim=draw(st.sampled_from([4, 8])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )
    generator, form, layer = torch.Generator().manual_seed(draw(st.integers(0, 999))), each.form, each.layer
    width, count = draw(st.integers(1, 18)), 20
    keys, values = (
        torch.randn(count, form.page_size, dim, generator=generator).to(each.dtype)
        for dim in (layer.key_dim, layer.value_dim)
    )
    positions = torch.randint(0, 100, (count, form.page_size), generator=generator, dtype=torch.int32)
    slab = torch.zeros(count, form.stride, dtype=torch.uint8)
    compressor.encode(form, keys, values, positions, slab)
    rows = torch.randint(0, count, (1, layer.kv_heads, width), generator=generator, dtype=torch.int32)
    live = torch.randint(0, all_live(form.page_size), rows.shape, generator=generator)
    live = torch.where(torch.rand(rows.shape, generator=generator) < 0.5, all_live(form.page_size), live)
    query = torch.randn(1, layer.kv_heads, layer.group, layer.key_dim, generator=generator).to(each.dtype)
    oldest = draw(st.none() | st.just(torch.randint(0, 120, (1, layer.group), generator=generator)))
    return each, query, Pages(slab=slab, rows=rows, live=live, run=None), oldest


@pytest.mark.property
@FEW
@given(cases())
def test_attention_equals_the_oracle(case):
    """Over shapes, types, subsets in any order, dead slots, windows, and more pages than one part has."""
    each, query, pages, oldest = case
    got, wanted = under_test().attend(each, CPU)(query, pages, oldest=oldest), oracle(each, *case[1:])
    torch.testing.assert_close(got.output.double(), wanted.output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.log_sum_exp.double(), wanted.log_sum_exp, atol=1e-5, rtol=1e-5)


@pytest.mark.property
@FEW
@given(st.data())
def test_codes_and_bounds_are_torchs_bit_for_bit(data):
    """Whatever the numbers: codes, scales, zeros, padding, and Quest's index."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    each = codec(data.draw(st.sampled_from([Exact(), Int8(), Int4(), Int2()])), key_dim=8, value_dim=8, dtype=dtype)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    states = torch.randn(2, 1, 1, 16, 8, generator=generator) * 10.0 ** torch.randint(-9, 4, (8,), generator=generator)
    for place in data.draw(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 7), NUMBERS), max_size=9)):
        states[..., place[0], place[1]] = place[2]
    states = states.to(dtype)
    tail, new = one_page(states, torch.randperm(16, generator=generator)[None])
    check_seals_as_torch(under_test(), each, tail, new)


def test_numbers_beyond_float16_are_refused():
    """With the compressor's own words."""
    model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=4)
    check_refuses_what_float16_cannot_hold(under_test(), model, 20, page_size=16)


def test_a_cache_decodes_by_these_kernels():
    """Sealed, chosen and attended to by them: what torch answers. `describe` says who serves."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=8)
    parts = {"compressor": Int4(), "page_selector": Quest(pages=2, dense_layers=0), "page_size": 16, "tail_tokens": 8}
    described = check_decodes_as_torch(under_test(), model, parts, batch=1, stops=[80, 81], atol=1e-5, rtol=1e-5)
    assert described.count("numba_cuda") == 3


def test_what_it_has_no_kernel_for():
    """Another device, values that keys hold, an index of codes: None, and torch serves."""
    backend, each = under_test(), codec(Exact())
    elsewhere = torch.device("meta")
    assert backend.attend(each, elsewhere) is None
    assert backend.choose(Quest(), each, elsewhere) is None
    assert backend.seal(each, None, elsewhere) is None
    layer = pikv.LayerConfig(query_heads=4, kv_heads=1, key_dim=96, value_dim=64, values="key_prefix")
    latent = PageCodec(compressor=Int8(), layer=layer, form=Int8().form(layer, page_size=16, dtype=torch.float32))
    assert backend.attend(latent, CPU) is None
    assert backend.seal(latent, None, CPU) is None
    assert backend.choose(pikv.policies.KeyCodes(), each, CPU) is None
