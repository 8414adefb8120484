"""Quest: a bound on every q.k, and pages read by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.adapters.compressors import Int4
from pikv.core.exact import Exact
from pikv.core.ports import Compressor, PageIndex, PageSelector
from pikv.policies import Quest
from pikv.testing.page_selector import PageSelectorConformance

MODEL = pikv.ModelConfig(layers=3, query_heads=8, kv_heads=2, head_dim=16)


class TestQuestConforms(PageSelectorConformance):
    """The shipped suite."""

    def make(self) -> PageSelector:
        return Quest()


@pytest.mark.property
@given(
    seed=st.integers(0, 2**32),
    magnitude=st.sampled_from([1e-6, 1.0, 300.0, 1e6]),
    page_size=st.sampled_from([16, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_score_bounds_every_product(seed: int, magnitude: float, page_size: int, dtype: torch.dtype) -> None:
    """No q.k in a page is above its score, for keys of any magnitude and type, beyond float32 rounding."""
    generator = torch.Generator().manual_seed(seed)
    layer = pikv.LayerConfig(query_heads=4, kv_heads=2, key_dim=8, value_dim=8)
    keys = (torch.randn(2, 2, 5, page_size, 8, generator=generator) * magnitude).clamp(-6e4, 6e4).to(dtype)
    query = torch.randn(2, 2, 2, 8, generator=generator)
    arrays = torch.empty(20, 2, 8, dtype=torch.float16)
    Quest().index(keys.flatten(0, 2), arrays)
    index = PageIndex(arrays=arrays.view(2, 2, 5, 2, 8), present=torch.ones(2, 2, 5).bool(), layer=layer)
    scores = Quest().score(index, query)
    products = torch.einsum("skgd,skmpd->skmgp", query.double(), keys.double())
    rounding = 1e-5 * torch.einsum("skgd,skmpd->skmgp", query.double().abs(), keys.double().abs()).amax((-1, -2))
    assert Quest().index_form(layer, page_size).shape == (2, 8)
    assert (products.amax((-1, -2)) <= scores + rounding).all()


def decode(cache: pikv.PiKVCache, tokens: int = 1000, steps: int = 20) -> torch.Tensor:
    """The outputs of some decode steps after a prompt, the same for every cache: [steps, 3, 1, 8, 1, 16]."""
    generator = torch.Generator().manual_seed(5)
    outputs = []
    for position, count in [(0, tokens), *((tokens + step, 1) for step in range(steps))]:
        for layer_id in range(3):
            k, v = torch.randn(2, 1, 2, count, 16, generator=generator)
            q = torch.randn(1, 8, count, 16, generator=generator)
            cache.update(layer_id, position, k, v)
            out = cache.attend(layer_id, q)
            if count == 1:
                outputs.append(out)
    return torch.stack(outputs).unflatten(0, (steps, 3))


@pytest.mark.parametrize("compressor", [Exact(), Int4()], ids=repr)
def test_reading_all_pages_is_dense_attention(compressor: Compressor) -> None:
    """When as many pages are read as there are, and when one fewer than all is never reached, nothing changes."""
    dense = decode(pikv.compose(MODEL, compressor=compressor, page_size=16))
    chosen = decode(
        pikv.compose(MODEL, compressor=compressor, page_size=16, page_selector=Quest(pages=100, dense_layers=0))
    )
    assert torch.equal(dense, chosen)


def test_dense_layers_read_everything() -> None:
    """The first layers give what dense attention gives; a later one reads less and differs."""
    dense = decode(pikv.compose(MODEL, page_size=16))
    chosen = decode(pikv.compose(MODEL, page_size=16, page_selector=Quest(pages=4, dense_layers=2)))
    assert torch.equal(dense[:, :2], chosen[:, :2])
    assert not torch.allclose(dense[:, 2], chosen[:, 2])


def test_the_right_page_is_read() -> None:
    """A key that answers the query alone among a thousand is found, though 4 of 54 pages are read."""
    cache = pikv.compose(
        pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=16),
        page_size=16,
        page_selector=Quest(pages=4, dense_layers=0),
    )
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 1, 1, 1000, 16, generator=generator)
    q = torch.randn(1, 2, 1, 16, generator=generator)
    k[0, 0, 333] = 10 * q[0].mean(0)
    cache.update(0, 0, k, v)
    cache.attend(0, torch.randn(1, 2, 1000, 16, generator=generator))
    cache.update(0, 1000, torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16))
    out = cache.attend(0, 10 * q.mean(1, keepdim=True).expand(1, 2, 1, 16))
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, 333], atol=1e-3, rtol=0)


def test_index_bytes_are_counted() -> None:
    """stored_bytes counts the index: 2 float16 numbers for each channel of each page."""
    cache = pikv.compose(MODEL, page_size=16, page_selector=Quest())
    decode(cache, steps=1)
    pages = cache.stored_bytes().pages // (2 * 16 * 16 * 4 + 64)
    assert pages > 0
    assert cache.stored_bytes().indexes == pages * 2 * 16 * 2


def test_forks_keep_their_indexes() -> None:
    """After a fork, a reorder and new pages in both, each cache reads by the index of its own pages."""
    cache = pikv.compose(MODEL, page_size=16, page_selector=Quest(pages=4, dense_layers=0))
    decode(cache, steps=1)
    other = cache.fork()
    cache.reorder([0])
    twins = []
    for held in (cache, other):
        generator = torch.Generator().manual_seed(9)
        for position in range(1001, 1080):
            for layer_id in range(3):
                k, v = torch.randn(2, 1, 2, 1, 16, generator=generator)
                held.update(layer_id, position, k, v)
                out = held.attend(layer_id, torch.randn(1, 8, 1, 16, generator=generator))
        twins.append(out)
    assert torch.equal(*twins)
