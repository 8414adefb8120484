"""What every backend's attention must do: derive from this, say how yours is made and for which codecs, run pytest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pikv.core import attention
from pikv.core.attention import Partial
from pikv.core.config import LayerConfig
from pikv.core.exact import Exact
from pikv.core.ports import Backend, Compressor, PageCodec, Pages, StepKernel
from pikv.core.tables import all_live, live_slots
from pikv.core.tail import EMPTY, Tail

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

    def test_one_query_a_head(self) -> None:
        """As a decoded token asks: one query for each query head."""
        for each in self.codecs():
            query = some_queries(each)[:, :, : each.layer.group]
            self._check(each, some_pages(each, seed=6), oldest=None, query=query)

    def test_many_queries(self) -> None:
        """More than a kernel may take at once."""
        for each in self.codecs():
            query = some_queries(each).repeat(1, 1, 12, 1)
            self._check(each, some_pages(each, seed=7), oldest=None, query=query)

    def test_log_sum_exp_of_each_page(self) -> None:
        """Written where it is asked for; together they are the whole's."""
        for each in self.codecs():
            kernel, pages, query = self.make().attend(each, CPU), some_pages(each, seed=8), some_queries(each)
            if kernel is None:
                continue
            page_lse = torch.empty(*query.shape[:3], pages.rows.shape[2])
            whole = kernel(query, pages, page_lse=page_lse)
            self._assert_near(page_lse.logsumexp(-1), whole.log_sum_exp.double())
            for column in range(pages.rows.shape[2]):
                one = Pages(slab=pages.slab, rows=pages.rows[..., [column]], live=pages.live[..., [column]], run=None)
                self._assert_near(page_lse[..., column], oracle(each, query, one, None).log_sum_exp)

    def test_a_step_takes_the_tail_along(self) -> None:
        """A StepKernel's step is attention to pages and tail together, to one of them alone, and to neither."""
        for each in self.codecs():
            kernel = self.make().attend(each, CPU)
            if not isinstance(kernel, StepKernel):
                continue
            query = some_queries(each)[:, :, : each.layer.group]
            for lengths in ([[3, 3], [3, 3]], [[0, 1], [70, 64]], [[0, 0], [0, 0]]):
                tail = some_tail(each, torch.tensor(lengths))
                for pages in (None, some_pages(each, seed=9)):
                    for oldest in (None, torch.tensor([[1005] * each.layer.group, [70] * each.layer.group])):
                        got = kernel.step(query, pages, tail, oldest=oldest)
                        wanted = step_oracle(each, query, pages, tail, oldest)
                        self._assert_near(got.output, wanted.output)
                        self._assert_near(got.log_sum_exp, wanted.log_sum_exp)

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

    def _check(self, each: PageCodec, pages: Pages, *, oldest: Tensor | None, query: Tensor | None = None) -> None:
        kernel, query = self.make().attend(each, CPU), some_queries(each) if query is None else query
        if kernel is None:
            return
        got, wanted = kernel(query, pages, oldest=oldest), oracle(each, query, pages, oldest)
        self._assert_near(got.output, wanted.output)
        self._assert_near(got.log_sum_exp, wanted.log_sum_exp)

    def _assert_near(self, got: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(got.double(), wanted, atol=self.tolerance, rtol=self.tolerance)


def codec(
    compressor: Compressor,
    *,
    page_size: int = 16,
    kv_heads: int = 2,
    group: int = 3,
    key_dim: int = 32,
    value_dim: int = 32,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> PageCodec:
    """A codec for a layer of KV heads with a group of query heads each."""
    layer = LayerConfig(
        query_heads=kv_heads * group, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim, softcap=softcap
    )
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


def some_tail(each: PageCodec, lengths: Tensor) -> Tail:
    """A tail of 2 sequences and 2 KV heads at positions from 1000 on, with room to spare; lengths int64 [2, 2]."""
    generator, room = torch.Generator().manual_seed(10), int(lengths.max()) + 5
    held = torch.arange(room) < lengths[..., None]
    return Tail(
        torch.randn(2, 2, room, each.layer.key_dim, generator=generator).to(each.dtype),
        torch.randn(2, 2, room, each.layer.value_dim, generator=generator).to(each.dtype),
        torch.where(held, torch.arange(1000, 1000 + room), EMPTY).int(),
        lengths,
        each.layer.value_dim,
    )


def step_oracle(each: PageCodec, query: Tensor, pages: Pages | None, tail: Tail, oldest: Tensor | None) -> Partial:
    """Float64 attention over the pages and the tail."""
    mask = (tail.positions != EMPTY)[:, :, None, :]
    if oldest is not None:
        mask = mask & (tail.positions[:, :, None, :] >= oldest[:, None, :, None])
    keys, values, scale = tail.keys.double(), tail.values.double(), each.layer.scale
    parts = [attention.attend(query.double(), keys, values, scale=scale, softcap=each.layer.softcap, mask=mask)]
    if pages is not None:
        parts.append(oracle(each, query, pages, oldest))
    return attention.merge(parts)
