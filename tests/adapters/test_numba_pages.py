"""Numba's choice and sealing of pages: the suite that torch passes too, and torch as the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import NUMBERS, check_chooses_as_torch, check_seals_as_torch, one_page

import pikv
from pikv.adapters.compressors import Int2, Int4, Int8
from pikv.core.exact import Exact
from pikv.core.ports import Backend, Compressor, IndexedPages, PageCodec, PageSelector
from pikv.core.torch_backend import TorchBackend
from pikv.policies import KeyCodes, Quest
from pikv.testing.backend import CPU, codec
from pikv.testing.page_kernels import ChoiceMade, PageKernelConformance

numba_cpu = pytest.importorskip("pikv.adapters.numba_cpu", reason="numba is not installed")


class TestNumbaPageKernels(PageKernelConformance):
    """The shipped suite, by the best way that this processor has."""

    path = None
    share_tolerance = 2e-3  # of queries in bytes

    def make(self) -> Backend:
        return numba_cpu.NumbaCpu(path=self.path)

    def codecs(self) -> Iterable[PageCodec]:
        yield from super().codecs()
        for compressor, page_size in itertools.product((Int8(), Int4(), Int2()), (16, 64)):
            yield codec(compressor, page_size=page_size, value_dim=48)
        yield codec(Int4(), key_dim=20, value_dim=20)  # rows that fill no whole words, and are in the order "plain"

    def selectors(self) -> Iterable[PageSelector]:
        yield from super().selectors()
        yield Quest(pages=2)
        for bits, mass in ((1, 0.5), (2, 0.9), (2, None), (4, 0.99)):
            yield KeyCodes(bits=bits, pages=25, mass=mass)

    def test_has_all_kernels(self):
        """For every codec of this suite, and for a key_dim of whole vectors."""
        for each in self.codecs():
            assert self.make().seal(each, Quest(), CPU) is not None
        for selector in (Quest(), KeyCodes(bits=1), KeyCodes(bits=2), KeyCodes(bits=4)):
            assert self.make().choose(selector, codec(Exact()), CPU) is not None


class TestPortablePageKernels(TestNumbaPageKernels):
    """The same, as on a processor without AVX-512."""

    path = "portable"
    share_tolerance = 1e-5


class Negated(Compressor):
    """Dense bytes that are not the tokens' own: only the compressor can write them."""

    def form(self, layer, *, page_size, dtype):
        return Exact().form(layer, page_size=page_size, dtype=dtype)

    def encode(self, form, keys, values, positions, out):
        Exact().encode(form, -keys, -values, positions, out)

    def decode(self, form, pages):
        return tuple(-states for states in Exact().decode(form, pages))


def test_what_it_has_no_kernel_for():
    """Another device, a key_dim of no whole vectors, bytes that are a compressor's own: None, and torch serves."""
    backend, each = numba_cpu.NumbaCpu(), codec(Exact())
    elsewhere = torch.device("meta")
    assert backend.choose(Quest(), each, elsewhere) is None
    for selector in (Quest(), KeyCodes()):
        assert backend.choose(selector, codec(Exact(), key_dim=20), CPU) is None
    assert backend.choose(KeyCodes(bits=1), codec(Exact(), key_dim=48), CPU) is None
    assert backend.choose(KeyCodes(), codec(Exact(), softcap=5.0), CPU) is None
    assert backend.seal(each, None, elsewhere) is None
    assert backend.seal(codec(Negated()), None, CPU) is None


@st.composite
def tails(draw, dtype, page_size, dim):
    """A tail of one row of a page or two, and which slots are sealed: numbers that round in all ways."""
    tokens = page_size * draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = 10.0 ** torch.randint(-9, 4, (2, 1, 1, 1, dim), generator=generator)
    states = torch.randn(2, 1, 1, tokens, dim, generator=generator) * scale
    for place in draw(st.lists(st.tuples(st.integers(0, tokens - 1), st.integers(0, dim - 1), NUMBERS), max_size=12)):
        states[..., place[0], place[1]] = place[2]
    states[:, :, :, :, 0] = draw(NUMBERS)
    states = states.to(dtype).nan_to_num(nan=0.0).clamp(-65280, 65280)  # the largest bfloat16 within float16
    return one_page(states, torch.randperm(tokens, generator=generator)[:page_size].sort().values[None])


@pytest.mark.property
@given(st.data())
def test_codes_and_bounds_are_torchs_bit_for_bit(data):
    """Whatever the numbers: codes, scales, zeros, padding, and Quest's index."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    compressor = data.draw(st.sampled_from([Exact(), Int8(), Int4(), Int2()]))
    each = codec(compressor, page_size=data.draw(st.sampled_from([16, 64])), dtype=dtype)
    tail, new = data.draw(tails(dtype, each.form.page_size, 32))
    check_seals_as_torch(numba_cpu.NumbaCpu(), each, tail, new)


@pytest.mark.property
@given(st.data())
def test_the_choice_has_the_scores_of_torchs(data):
    """Whole numbers, whose sums are exact: the chosen scores are the same, ties or not, infinities included."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    kv_heads, group, width = (data.draw(st.integers(1, most)) for most in (3, 4, 150))
    check_chooses_as_torch(numba_cpu.NumbaCpu(), data, generator, kv_heads=kv_heads, group=group, width=width)


@pytest.mark.property
@given(st.data())
def test_the_choice_by_codes_is_torchs(data):
    """Queries of whole numbers, whose bytes are exact: the same shares of attention, and as few pages for a mass."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    kv_heads, group, width = (data.draw(st.integers(1, most)) for most in (3, 12, 60))
    bits, page_size = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([16, 64]))
    each = codec(Exact(), page_size=page_size, kv_heads=kv_heads, group=group, key_dim=32)
    selector = KeyCodes(
        bits=bits,
        pages=data.draw(st.integers(5, 40)),
        min_pages=data.draw(st.integers(1, 5)),
        mass=data.draw(st.sampled_from([None, 0.3, 0.9, 1.0])),
    )
    count = 2 * kv_heads * width
    keys = torch.randint(0, 2**bits, (count, page_size, 32), generator=generator).float()
    keys[:, 0], keys[:, 1] = 0.0, 2.0**bits - 1  # so that zeros are 0 and scales 1, but for one bit
    index = torch.empty(count, *selector.index_form(each.layer, page_size).shape, dtype=torch.uint8)
    selector.index(keys, index)
    query = torch.randint(-9, 10, (2, kv_heads, group, 32), generator=generator) / 8
    query[..., 0] = 127 / 8
    pages = IndexedPages(
        index=index,
        ids=torch.randperm(count, generator=generator).int().view(2, kv_heads, width),
        counts=torch.randint(0, width + 1, (2, kv_heads), generator=generator),
    )
    beside = 20 * torch.randn(2, kv_heads, group, generator=generator)
    one, other = (
        backend.choose(selector, each, CPU)(query, pages, beside=beside)
        for backend in (TorchBackend(), numba_cpu.NumbaCpu())
    )
    atol = 1e-2 if bits == 1 else 1e-4  # scales of one bit are any numbers
    torch.testing.assert_close(one.left_out, other.left_out, atol=atol + (selector.mass is not None), rtol=0)
    if selector.mass is None:
        assert torch.equal(one.reads, other.reads)
    else:
        made = [ChoiceMade(selector, each, choice, pages, query * each.layer.scale, beside) for choice in (one, other)]
        torch.testing.assert_close(made[1].left_out(), other.left_out, atol=atol, rtol=0)
        most = pages.counts.clamp(max=selector.pages)
        fine = made[1].left_out() <= 1 - selector.mass + atol
        least = made[1].left_out(but=1) > 1 - selector.mass - atol
        assert bool((fine | (other.reads == most)).all())
        assert bool((least | (other.reads == most.clamp(max=selector.min_pages))).all())


def test_numbers_beyond_float16_are_refused():
    """With the compressor's own words, and through the cache nothing is lost."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=32)
    backends = [numba_cpu.NumbaCpu(), TorchBackend()]
    cache = pikv.compose(model, compressor=Int8(), tail_tokens=1, backends=backends)
    k, v = torch.randn(2, 1, 1, 200, 32)
    for number in (1e6, -1e6):
        k[0, 0, 100, 3] = number
        cache.update(0, 0, k, v)
        with pytest.raises(pikv.InputError, match="keys must lie within float16"):
            cache.finish_prefill()
        assert int(cache.retrieve(0).mask.sum()) == 200
        cache.reset()


def test_a_cache_decodes_the_same_by_torch_and_by_numba():
    """Sealed by one backend or the other, read in part: the same bytes and, to rounding, the same answers."""
    model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=32)
    caches = [
        pikv.compose(model, compressor=Int4(), page_selector=Quest(pages=3, dense_layers=0), tail_tokens=16, backends=b)
        for b in ([TorchBackend()], [numba_cpu.NumbaCpu(), TorchBackend()])
    ]
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 2, 900, 32, generator=generator)
    q = torch.randn(2, 4, 900, 32, generator=generator)
    for start, stop in ((0, 870), (870, 899), (899, 900)):
        outputs = []
        for cache in caches:
            cache.update(0, start, k[:, :, start:stop], v[:, :, start:stop])
            outputs.append(cache.attend(0, q[:, :, start:stop]))
        torch.testing.assert_close(*outputs, atol=2e-3, rtol=0)
    first, second = (cache.retrieve(0) for cache in caches)
    assert torch.equal(first.keys, second.keys)
    assert torch.equal(first.values, second.values)
    assert str(caches[1].describe()).count("numba_cpu") == 3
