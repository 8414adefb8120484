"""The CUDA kernels pass the suites of every backend: compiled for the CPU here, on a GPU by `nox -s gpu`."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
    NUMBERS,
    check_chooses_as_torch,
    check_decodes_as_torch,
    check_refuses_what_float16_cannot_hold,
    check_seals_as_torch,
    one_page,
)

import pikv
from pikv.adapters.compressors import Int2, Int4, Int8
from pikv.adapters.cupy_gpu import CupyGpu
from pikv.compose import installed_backends
from pikv.core.exact import Exact
from pikv.core.ports import Backend, PageCodec, Pages, PageSelector
from pikv.core.tables import all_live
from pikv.core.torch_backend import TorchBackend
from pikv.policies import KeyCodes, Quest
from pikv.testing.backend import CPU, BackendConformance, codec, oracle
from pikv.testing.cuda_on_host import HostRunner, compiler
from pikv.testing.on_device import OnDevice
from pikv.testing.page_kernels import PageKernelConformance

pytestmark = pytest.mark.skipif(compiler() is None, reason="a C++ compiler is missing: g++ or clang++")
BFLOAT, HALF = torch.bfloat16, torch.float16
# What kernels are compiled for takes a second or two each, so tests share these.
DENSE = [codec(Exact(), page_size=64, value_dim=64, dtype=BFLOAT), codec(Exact(), page_size=16, dtype=HALF)]
AFFINE = [
    codec(Int8(), page_size=64, key_dim=64),
    codec(Int4(), page_size=32, value_dim=64, dtype=BFLOAT),
    codec(Int2(), page_size=16, dtype=HALF),
    codec(Int4(), page_size=64, group=9, softcap=5.0),
]


def under_test() -> Backend:
    """The kernels, on a GPU if this machine has one, else compiled for the CPU."""
    if torch.cuda.is_available():
        return OnDevice(CupyGpu(), torch.device("cuda"))
    return OnDevice(CupyGpu(runner=HostRunner()), CPU)


class TestAffine(BackendConformance):
    """Codes times 16-bit numbers: queries, weights, and their products with scales have 11 bits."""

    tolerance = 2e-3

    def make(self) -> Backend:
        return under_test()

    def codecs(self) -> Iterable[PageCodec]:
        return AFFINE


class TestDense(TestAffine):
    """Numbers as they are; in bfloat16 queries and weights have 8 bits."""

    tolerance = 2**-7

    def codecs(self) -> Iterable[PageCodec]:
        return DENSE


class TestPages(PageKernelConformance):
    """The shipped suite for choosing and sealing."""

    def make(self) -> Backend:
        return under_test()

    def codecs(self) -> Iterable[PageCodec]:
        yield codec(Exact(), value_dim=48, dtype=BFLOAT)
        yield codec(Exact(), page_size=32, key_dim=20)
        yield codec(Int8(), page_size=64, key_dim=80, value_dim=48, dtype=HALF)
        yield codec(Int4(), page_size=32, value_dim=64)
        yield codec(Int4(), key_dim=20, value_dim=20)  # rows that fill no whole words, and are in the order "plain"
        yield codec(Int2(), page_size=64, dtype=BFLOAT)

    def selectors(self) -> Iterable[PageSelector]:
        yield Quest(pages=3)


@pytest.mark.slow
class TestMoreShapes(TestAffine):
    """Every head_dim that models have, key_dim unlike value_dim, few query heads and many."""

    tolerance = 2**-7

    def codecs(self) -> Iterable[PageCodec]:
        dims = ((128, 128, 4), (256, 256, 1), (192, 128, 16), (128, 256, 12), (64, 32, 2))
        for compressor, dtype in ((Exact(), BFLOAT), (Exact(), HALF), (Int8(), HALF), (Int4(), HALF), (Int2(), HALF)):
            for key_dim, value_dim, group in dims:
                yield codec(compressor, page_size=64, group=group, key_dim=key_dim, value_dim=value_dim, dtype=dtype)


@st.composite
def cases(draw):
    """A codec, and pages of any number in any order, some of them dead in part, queries and a window."""
    each = draw(st.sampled_from([*DENSE, *AFFINE]))
    generator, form, layer = torch.Generator().manual_seed(draw(st.integers(0, 999))), each.form, each.layer
    sequences, width, count = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 6, 40])), 20
    channel = torch.where(torch.rand(layer.key_dim, generator=generator) < 0.05, 10.0, 1.0)  # some far larger
    keys, values = (
        torch.randn(count, form.page_size, dim, generator=generator) for dim in (layer.key_dim, layer.value_dim)
    )
    positions = torch.randint(0, 100, (count, form.page_size), generator=generator, dtype=torch.int32)
    slab = torch.zeros(count, form.stride, dtype=torch.uint8)
    each.compressor.encode(form, (keys * channel).to(each.dtype), values.to(each.dtype), positions, slab)
    shape = sequences, layer.kv_heads, width
    rows = torch.randint(0, count, shape, generator=generator, dtype=torch.int32)
    live = torch.randint(0, all_live(form.page_size) % 2**63, shape, generator=generator)
    kind = torch.rand(shape, generator=generator)
    live = torch.where(kind < 0.6, all_live(form.page_size), torch.where(kind < 0.8, 0, live))
    queries = draw(st.integers(1, 20))
    query = torch.randn(sequences, layer.kv_heads, queries, layer.key_dim, generator=generator)
    query = query * draw(st.sampled_from([0.01, 1.0, 8.0]))
    oldest = draw(st.none() | st.just(torch.randint(0, 120, (sequences, queries), generator=generator)))
    return each, query.to(each.dtype), Pages(slab=slab, rows=rows, live=live, run=None), oldest


@pytest.mark.property
@given(cases())
def test_attention_equals_the_oracle(case):
    """Over types, subsets in any order, dead slots and pages, windows, outlier channels, and one part or several."""
    each, query, pages, oldest = case
    got, wanted = under_test().attend(each, CPU)(query, pages, oldest=oldest), oracle(each, query, pages, oldest)
    near = 2**-7 if each in DENSE else 2e-3
    keys, _ = each.compressor.decode(each.form, pages.slab)
    # A score is a sum as large as its terms allow; what is rounded in it moves a weight by as much.
    terms = each.layer.scale * query.double().norm(dim=-1).amax() * keys.double().norm(dim=-1).amax()
    near *= max(1.0, float(terms) / 8)
    torch.testing.assert_close(got.output.double(), wanted.output, atol=near, rtol=near)
    torch.testing.assert_close(got.log_sum_exp.double(), wanted.log_sum_exp, atol=near, rtol=near)


def test_nothing_that_is_dead_is_read():
    """What a dead page holds may be no number at all, as memory that was never written."""
    for each in (DENSE[0], AFFINE[0]):
        slab = torch.full((2, each.form.stride), 255, dtype=torch.uint8)
        keys = torch.randn(1, each.form.page_size, each.layer.key_dim).to(each.dtype)
        values = torch.randn(1, each.form.page_size, each.layer.value_dim).to(each.dtype)
        each.compressor.encode(each.form, keys, values, torch.arange(each.form.page_size)[None].int(), slab[:1])
        rows = torch.tensor([0, 1], dtype=torch.int32).expand(1, 2, 2)
        live = torch.tensor([all_live(each.form.page_size), 0]).expand(1, 2, 2)
        query = torch.randn(1, 2, each.layer.group, each.layer.key_dim).to(each.dtype)
        pages, alone = (Pages(slab=slab, rows=rows[..., :n], live=live[..., :n], run=None) for n in (2, 1))
        attend = under_test().attend(each, CPU)
        assert torch.equal(attend(query, pages).output, attend(query, alone).output)


@functools.cache
def sealed_codec(compressor, page_size, dtype):
    return codec(compressor, page_size=page_size, dtype=dtype)


@pytest.mark.property
@given(st.data())
def test_codes_and_bounds_are_torchs_bit_for_bit(data):
    """Whatever the numbers: codes, scales, zeros, padding, and Quest's index."""
    kinds = [(Int8(), 64, torch.float32), (Int4(), 16, HALF), (Int2(), 64, torch.float32), (Exact(), 16, BFLOAT)]
    each = sealed_codec(*data.draw(st.sampled_from(kinds)))
    dtype, tokens = each.dtype, each.form.page_size
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    size = 10.0 ** torch.randint(-9, 4, (2, 1, 1, 1, 32), generator=generator)
    states = torch.randn(2, 1, 1, tokens, 32, generator=generator) * size
    for place in data.draw(st.lists(st.tuples(st.integers(0, tokens - 1), st.integers(0, 31), NUMBERS), max_size=12)):
        states[..., place[0], place[1]] = place[2]
    if data.draw(st.booleans()):  # whole numbers and halves of a step: ties
        states = torch.randint(0, 511, states.shape, generator=generator) * 0.5
    states = states.to(dtype)
    tail, new = one_page(states, torch.randperm(tokens, generator=generator)[None])
    check_seals_as_torch(under_test(), each, tail, new)


@pytest.mark.property
@given(st.data())
def test_the_choice_has_the_scores_of_torchs(data):
    """Whole numbers, whose sums are exact: the chosen scores are the same, ties or not, infinities included."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    kv_heads, group = (data.draw(st.integers(1, most)) for most in (2, 4))
    width = data.draw(st.sampled_from([1, 5, 33, 300]))
    check_chooses_as_torch(under_test(), data, generator, kv_heads=kv_heads, group=group, width=width)


def test_numbers_beyond_float16_are_refused():
    """With the compressor's own words, and nothing is lost."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=32)
    check_refuses_what_float16_cannot_hold(under_test(), model, 100)


def test_a_cache_decodes_by_these_kernels():
    """Sealed, chosen and attended to by them: what torch answers. `describe` says who serves."""
    model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=32)
    parts = {"compressor": Int4(), "page_selector": Quest(pages=3, dense_layers=0), "tail_tokens": 16}
    described = check_decodes_as_torch(under_test(), model, parts, batch=2, stops=[570, 599, 600], atol=2e-3, rtol=0)
    assert described.count("cupy_gpu") == 3


def test_what_it_has_no_kernel_for():
    """Another device, float32 as it is, dimensions of no whole fragments, an index of codes: None, and torch serves."""
    backend, each = under_test(), DENSE[0]
    elsewhere = torch.device("meta")
    assert backend.attend(each, elsewhere) is None
    assert backend.choose(Quest(), each, elsewhere) is None
    assert backend.seal(each, None, elsewhere) is None
    assert backend.attend(codec(Exact()), CPU) is None
    assert backend.attend(codec(Int8(), key_dim=48), CPU) is None
    assert backend.choose(KeyCodes(), each, CPU) is None
    assert backend.choose(Quest(), codec(Exact(), group=17), CPU) is None
    assert CupyGpu().attend(each, CPU) is None
    assert CupyGpu(runner=HostRunner()).attend(each, elsewhere) is None
    layer = pikv.LayerConfig(query_heads=4, kv_heads=1, key_dim=96, value_dim=64, values="key_prefix")
    latent = PageCodec(compressor=Int8(), layer=layer, form=Int8().form(layer, page_size=16, dtype=HALF), dtype=HALF)
    assert backend.attend(latent, CPU) is None
    assert backend.seal(latent, None, CPU) is None


def test_the_composer_asks_for_it_on_a_gpu():
    """There it comes first, and torch after it; without CuPy the description says what is lacking, and torch serves."""
    first, last = installed_backends(torch.device("cuda"))
    assert first.name.startswith("cupy_gpu")
    assert last == TorchBackend()
    assert installed_backends()[-1] == TorchBackend()
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=32)
    if importlib.util.find_spec("cupy") is None:
        described = str(pikv.compose(model, backends=(first, last)).describe())
        assert "cupy_gpu is missing: install pikv[cuda12]" in described


@pytest.mark.slow
def test_the_benchmark_can_be_rehearsed():
    """Every contestant that a CPU can have runs once, so that a GPU's time is not lost to a typing error."""
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    done = subprocess.run([sys.executable, str(script), "--rehearse"], capture_output=True, text=True, check=True)
    assert "12 contestants ran" in done.stdout
