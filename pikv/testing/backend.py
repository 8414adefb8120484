"""What every backend's attention must do: derive from this, say how yours is made and for which codecs, run pytest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pikv.core import attention
from pikv.core.attention import Partial
from pikv.core.config import LayerConfig
from pikv.core.exact import Exact
from pikv.core.ports import Backend, Compressor, PageCodec, Pages
from pikv.core.tables import all_live, live_slots

CPU = torch.device("cpu")


class BackendConformance:
    """The suite: kernels equal the oracle over the decoded tokens. `make` returns the backend under test."""

    tolerance = 1e-5
    """Of outputs and log-sum-exp, in float32, against float64 attention over what the pages decode to."""

    def make(self) -> Backend:
        """The backend under test."""
        raise TypeError(f"{type(self).__name__} must define make(), which returns the backend under test")

    def codecs(self) -> Iterable[PageCodec]:
        """The codecs to attend to; the backend may have no kernel for some."""
        for page_size in (16, 32, 64):
            for key_dim, value_dim in ((32, 32), (64, 16)):
                yield codec(Exact(), page_size=page_size, key_dim=key_dim, value_dim=value_dim)
        yield codec(Exact(), softcap=5.0)
        yield codec(Exact(), dtype=torch.bfloat16)
        yield codec(Exact(), dtype=torch.float16)

    def test_has_a_name(self) -> None:
        """The name is what describe() prints."""
        assert self.make().name

    def test_serves_something(self) -> None:
        """There is a kernel for at least one of the codecs."""
        assert any(self.make().attend(each, CPU) is not None for each in self.codecs())

    def test_equals_the_oracle(self) -> None:
        """Over pages in any order, with dead slots, and rows with fewer pages than the longest."""
        for each in self.codecs():
            pages = some_pages(each, seed=1)
            self._check(each, pages, oldest=None)

    def test_pages_that_lie_side_by_side(self) -> None:
        """A run of live pages gives the same as the same pages named one by one."""
        for each in self.codecs():
            pages = some_pages(each, seed=2)
            count = pages.rows.numel()
            rows = torch.arange(count, dtype=torch.int32).view(pages.rows.shape[2], *pages.rows.shape[:2])
            live = torch.full_like(pages.live, all_live(each.form.page_size))
            side_by_side = Pages(slab=pages.slab, rows=rows.permute(1, 2, 0).contiguous(), live=live, run=0)
            self._check(each, side_by_side, oldest=None)

    def test_queries_see_from_their_oldest_position_on(self) -> None:
        """Each query has a bound of its own on how far back it sees; one sees nothing."""
        for each in self.codecs():
            pages = some_pages(each, seed=3)
            oldest = torch.tensor([[0, 5, 40], [10_000, 20, 3]]).repeat(1, each.layer.group)
            self._check(each, pages, oldest=oldest)

    def test_nothing_to_read(self) -> None:
        """Dead pages alone give the output 0 and the log-sum-exp -inf."""
        for each in self.codecs():
            pages = some_pages(each, seed=4)
            self._check(each, Pages(slab=pages.slab, rows=pages.rows, live=0 * pages.live, run=None), oldest=None)

    def test_changes_nothing(self) -> None:
        """Neither the pages nor the query change, and the same call gives the same bits."""
        for each in self.codecs():
            kernel, pages, query = self.make().attend(each, CPU), some_pages(each, seed=5), some_queries(each)
            if kernel is None:
                continue
            before = pages.slab.clone(), query.clone()
            first, second = kernel(query, pages), kernel(query, pages)
            assert torch.equal(pages.slab, before[0])
            assert torch.equal(query, before[1])
            assert torch.equal(first.output, second.output)
            assert torch.equal(first.log_sum_exp, second.log_sum_exp)

    def _check(self, each: PageCodec, pages: Pages, *, oldest: Tensor | None) -> None:
        kernel, query = self.make().attend(each, CPU), some_queries(each)
        if kernel is None:
            return
        got, wanted = kernel(query, pages, oldest=oldest), oracle(each, query, pages, oldest)
        torch.testing.assert_close(got.output.double(), wanted.output, atol=self.tolerance, rtol=self.tolerance)
        torch.testing.assert_close(
            got.log_sum_exp.double(), wanted.log_sum_exp, atol=self.tolerance, rtol=self.tolerance
        )


def codec(
    compressor: Compressor,
    *,
    page_size: int = 16,
    key_dim: int = 32,
    value_dim: int = 32,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> PageCodec:
    """A codec for a layer of 2 KV heads with 3 query heads each."""
    layer = LayerConfig(query_heads=6, kv_heads=2, key_dim=key_dim, value_dim=value_dim, softcap=softcap)
    form = compressor.form(layer, page_size=page_size, dtype=dtype)
    return PageCodec(compressor=compressor, layer=layer, form=form, dtype=dtype)


def some_pages(each: PageCodec, *, seed: int) -> Pages:
    """Pages [2 sequences, 2 kv_heads, 5] in a shuffled slab; some slots dead, some pages absent."""
    generator = torch.Generator().manual_seed(seed)
    form, layer, count = each.form, each.layer, 2 * 2 * 5
    keys = torch.randn(count, form.page_size, layer.key_dim, generator=generator)
    values = torch.randn(count, form.page_size, layer.value_dim, generator=generator)
    positions = torch.arange(count * form.page_size, dtype=torch.int32).view(count, form.page_size) % (
        5 * form.page_size
    )
    slab = torch.zeros(count + 3, form.stride, dtype=torch.uint8)
    each.compressor.encode(form, keys, values, positions.view(count, -1), slab[:count])
    rows = torch.randperm(count, generator=generator).int().view(2, 2, 5)
    live = torch.full((2, 2, 5), all_live(form.page_size))
    live[0, 0, 1] = 0b1011
    live[1, :, 3:] = 0
    return Pages(slab=slab, rows=rows, live=live, run=None)


def some_queries(each: PageCodec) -> Tensor:
    """Queries [2 sequences, 2 kv_heads, group * 3 tokens, key_dim]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, each.layer.group * 3, each.layer.key_dim, generator=generator)


def oracle(each: PageCodec, query: Tensor, pages: Pages, oldest: Tensor | None) -> Partial:
    """Float64 attention over the decoded live slots."""
    stored = pages.slab[pages.rows.flatten().long()]
    keys, values = (
        states.double().unflatten(0, pages.rows.shape).flatten(2, 3)
        for states in each.compressor.decode(each.form, stored)
    )
    mask = live_slots(pages.live, each.form.page_size).flatten(2)[:, :, None, :]
    if oldest is not None:
        positions = each.form.view(stored, "positions").unflatten(0, pages.rows.shape).flatten(2)
        mask = mask & (positions[:, :, None, :] >= oldest[:, None, :, None])
    scale, softcap = each.layer.scale, each.layer.softcap
    return attention.attend(query.double(), keys, values, scale=scale, softcap=softcap, mask=mask)
