"""Numba's kernels pass the backend suite, in whichever vectors, and do not care how many threads there are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import attrs
import numba
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.adapters.compressors import Exact, Int2, Int4, Int8
from pikv.adapters.numba_cpu import NumbaCpu, kernel
from pikv.core.ports import Backend, PageCodec, Pages
from pikv.core.tables import all_live
from pikv.core.torch_backend import TorchBackend
from pikv.testing.backend import CPU, BackendConformance, codec, oracle, some_pages, some_tail

# What kernels are compiled for takes seconds each, so all tests share these.
DENSE = [
    codec(Exact(), page_size=16),
    codec(Exact(), page_size=64, key_dim=33, value_dim=96, dtype=torch.bfloat16),
]
HALF = codec(Exact(), page_size=32, key_dim=64, value_dim=128, dtype=torch.float16)
AFFINE = [
    codec(Int8(), page_size=64, key_dim=32, value_dim=64),
    codec(Int4(), page_size=16, key_dim=96, value_dim=32, dtype=torch.float16),
    codec(Int2(), page_size=32, key_dim=64, value_dim=32, dtype=torch.bfloat16),
]


class TestDense(BackendConformance):
    """Pages that are stored as they are."""

    def make(self) -> Backend:
        return NumbaCpu()

    def codecs(self) -> Iterable[PageCodec]:
        return [*DENSE, HALF]


class TestDensePortable(BackendConformance):
    """The same without AVX-512."""

    def make(self) -> Backend:
        return NumbaCpu(path="portable")

    def codecs(self) -> Iterable[PageCodec]:
        return DENSE


class TestAffine(BackendConformance):
    """Codes times digits: queries and weights have 14 bits."""

    tolerance = 1e-3

    def make(self) -> Backend:
        return NumbaCpu()

    def codecs(self) -> Iterable[PageCodec]:
        return AFFINE


class TestAffinePortable(BackendConformance):
    """Codes as floats."""

    def make(self) -> Backend:
        return NumbaCpu(path="portable")

    def codecs(self) -> Iterable[PageCodec]:
        return AFFINE


@pytest.mark.parametrize("compressor", [Exact(), Int8()])
def test_values_that_keys_hold_are_left_to_torch(compressor):
    """Kernels read values where page and tail store them, so torch serves a layer of latents, as `describe` says."""
    layer = pikv.LayerConfig(query_heads=4, kv_heads=1, key_dim=96, value_dim=64, values="key_prefix")
    cache = pikv.compose(
        pikv.ModelConfig.of([layer]), compressor=compressor, page_size=32, backends=(NumbaCpu(), TorchBackend())
    )
    steps = cache.describe().steps
    assert steps["seal, layers 0"] == "torch"
    assert steps["attend, layers 0"].startswith("torch")
    assert "KeyPrefix(dim=64)" in steps["attend, layers 0"]


@pytest.mark.slow
class TestMoreShapes(BackendConformance):
    """Every head_dim that models have, key_dim unlike value_dim, few query heads and many."""

    tolerance = 1e-3

    def make(self) -> Backend:
        return NumbaCpu()

    def codecs(self) -> Iterable[PageCodec]:
        for compressor in (Exact(), Int4()):
            for key_dim, value_dim, query_heads in ((128, 128, 2), (256, 256, 16), (192, 128, 142), (80, 64, 10)):
                layer = pikv.LayerConfig(query_heads=query_heads, kv_heads=2, key_dim=key_dim, value_dim=value_dim)
                form = compressor.form(layer, page_size=64, dtype=torch.float32)
                yield PageCodec(compressor=compressor, layer=layer, form=form)


@pytest.mark.slow
class TestMoreShapesPortable(TestMoreShapes):
    """The same without AVX-512."""

    def make(self) -> Backend:
        return NumbaCpu(path="portable")


def tolerance(each, path):
    """Digits are used for codes where the processor multiplies bytes."""
    return 1e-3 if each in AFFINE and path is None else 1e-5


@st.composite
def cases(draw):
    """A codec, pages of rows of any length in any order, some slots and pages dead, and queries of any sharpness."""
    path = draw(st.sampled_from([None, "portable"]))
    each = draw(st.sampled_from([*DENSE, *AFFINE]))
    sequences, width = draw(st.integers(1, 3)), draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    form, layer, count = each.form, each.layer, sequences * 2 * width + 1
    keys = torch.randn(count, form.page_size, layer.key_dim, generator=generator)
    keys[..., draw(st.integers(0, layer.key_dim - 1))] *= draw(st.sampled_from([0.0, 1.0, 30.0]))
    values = torch.randn(count, form.page_size, layer.value_dim, generator=generator)
    positions = torch.arange(count * form.page_size, dtype=torch.int32).view(count, form.page_size)
    slab = torch.zeros(count, form.stride, dtype=torch.uint8)
    each.compressor.encode(form, keys.to(each.dtype), values.to(each.dtype), positions, slab)
    rows = torch.randint(count, (sequences, 2, width), generator=generator, dtype=torch.int32)
    live = torch.randint(-(2**62), 2**62, rows.shape, generator=generator) & all_live(form.page_size)
    kind = torch.randint(3, rows.shape, generator=generator)
    live = torch.where(kind == 0, 0, torch.where(kind == 1, live, all_live(form.page_size)))
    query = torch.randn(sequences, 2, draw(st.integers(1, 9)), layer.key_dim, generator=generator)
    query = (query * draw(st.sampled_from([0.01, 1.0, 20.0]))).to(each.dtype)
    return path, each, query, Pages(slab=slab, rows=rows, live=live, run=None)


@pytest.mark.property
@given(cases())
def test_kernels_equal_the_oracle(case):
    """Over shapes, types, lengths, subsets in any order, dead slots, outlier channels and sharp queries."""
    path, each, query, pages = case
    got, wanted = NumbaCpu(path=path).attend(each, CPU)(query, pages), oracle(each, query, pages, None)
    near = tolerance(each, path)
    # A score is a sum as large as its terms allow; what is rounded in it moves a weight by as much.
    terms = each.layer.scale * query.double().norm(dim=-1).amax() * largest_key(each, pages)
    near = near * max(1.0, float(terms) / 8)
    torch.testing.assert_close(got.output.double(), wanted.output, atol=near, rtol=near)
    torch.testing.assert_close(got.log_sum_exp.double(), wanted.log_sum_exp, atol=near, rtol=near)


def largest_key(each, pages):
    keys, _ = each.compressor.decode(each.form, pages.slab)
    return keys.double().norm(dim=-1).amax()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    with patch.object(kernel, "BYTES_A_WORKER", 1):  # so that little work is shared out too
        yield torch.set_num_threads
    torch.set_num_threads(before)


# Not a shortcut: numba's pool cannot grow past its setting, and one thread has nothing to be compared with.
NEEDS_TWO_THREADS = pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 2, reason="a second thread is missing: NUMBA_NUM_THREADS or the machine allows one"
)


@NEEDS_TWO_THREADS
def test_results_do_not_depend_on_threads(threads):
    """One thread and two give the same bits, of pages and tail together."""
    each = DENSE[0]
    pages, tail = some_pages(each, seed=1), some_tail(each, torch.tensor([[3, 3], [70, 4]]))
    query, attend = torch.randn(2, 2, each.layer.group, each.layer.key_dim), NumbaCpu().attend(each, CPU)
    answers = []
    for count in (1, 2):
        threads(count)
        answers.append(attend.step(query, pages, tail))
    assert torch.equal(answers[0].output, answers[1].output)
    assert torch.equal(answers[0].log_sum_exp, answers[1].log_sum_exp)


@NEEDS_TWO_THREADS
def test_several_python_threads_may_attend_at_once(threads):
    """Each gets what it asked for, though kernels and their threads are shared."""
    threads(2)
    each = DENSE[0]
    attend, pages = NumbaCpu().attend(each, CPU), some_pages(each, seed=1)
    queries = [torch.randn(2, 2, 3, each.layer.key_dim) for _ in range(8)]
    alone = [attend(query, pages).output for query in queries]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            together = list(pool.map(lambda query: attend(query, pages).output, queries))
            assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.parametrize("each", [*DENSE, *AFFINE], ids=lambda each: f"{type(each.compressor).__name__}-{each.dtype}")
@pytest.mark.parametrize("window", [None, 100])
def test_a_composed_cache_answers_as_with_torch(each, window):
    """Prompt, decoding past several seals and a second turn: outputs are those of the torch backend."""
    layer = attrs.evolve(each.layer, window=window)
    model = pikv.ModelConfig.of([layer], dtype=each.dtype)
    parts = {"compressor": each.compressor, "page_size": each.form.page_size, "tail_tokens": 20}
    fast, slow = pikv.compose(model, **parts), pikv.compose(model, **parts, backends=[TorchBackend()])
    near = max(tolerance(each, None), torch.finfo(each.dtype).eps)
    generator, start = torch.Generator().manual_seed(0), 0
    for tokens in [150, *[1] * 40, 5, 1, 1]:
        heads = [(2, layer.key_dim), (2, layer.value_dim), (6, layer.key_dim)]
        k, v, q = (torch.randn(2, n, tokens, dim, generator=generator).to(each.dtype) for n, dim in heads)
        for cache in (fast, slow):
            cache.update(0, start, k, v)
        torch.testing.assert_close(fast.attend(0, q), slow.attend(0, q), atol=near, rtol=near)
        start += tokens


def test_describe_says_which_vectors_run():
    """The name of the path stands in the description."""
    model = pikv.ModelConfig(layers=1, query_heads=6, kv_heads=2, head_dim=32)
    assert "numba_cpu" in str(pikv.compose(model).describe())
    backends = [NumbaCpu(path="portable"), TorchBackend()]
    assert "numba_cpu portable" in str(pikv.compose(model, backends=backends).describe())


def test_torch_serves_what_no_kernel_knows():
    """A softcap, or values that do not fill vectors."""
    for layer in ({"softcap": 5.0}, {"value_dim": 20}):
        assert NumbaCpu().attend(codec(Exact(), **layer), CPU) is None
        assert NumbaCpu().attend(codec(Int8(), **layer), CPU) is None


def test_import_pikv_does_not_import_numba():
    """Numba is imported when a cache is composed."""
    program = "import sys, pikv; assert not any(name.startswith('numba') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
