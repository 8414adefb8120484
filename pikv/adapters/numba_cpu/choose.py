"""The choice of pages by bounds on their keys: every page is scored and the best of a row found in one call.

The index is read where it lies, by page id, once for all query heads of a group. What a page scores does not depend on
how the work is shared out, and neither does the choice.
"""

from __future__ import annotations

from typing import Any, final

import attrs
import numba
import numpy as np
import torch
from torch import Tensor

from pikv.adapters.numba_cpu.attend import share
from pikv.adapters.numba_cpu.best import best
from pikv.adapters.numba_cpu.compiled import COMPILED, part
from pikv.adapters.numba_cpu.launch import Launch, workers_for
from pikv.adapters.numba_cpu.machine import Machine
from pikv.adapters.numba_cpu.shape import FLOAT, HALF
from pikv.adapters.numba_cpu.simd import load, prefetch_near
from pikv.adapters.numba_cpu.static import static
from pikv.adapters.numba_cpu.tiles import Tile, add_products, put_totals, zeros
from pikv.core.ports import Choice, ChooseKernel, IndexedPages, IndexMeaning, MassSelector, PageCodec, PageSelector

PAGES_AHEAD = 8  # that the index is fetched for before it is read
BYTES_A_WORKER = 1 << 17  # of index; less is scored sooner than another thread is woken


@static
@attrs.frozen
class Bounds:
    """What the kernel is compiled for: an index of float16 [2, key_dim] a page, and queries that come in groups.

    sources: of the kernels' source files, so that none compiled from others is taken from disk.
    """

    machine: Machine
    key_dim: int
    group: int
    sources: int

    @property
    def numbers(self) -> int:
        """Of a page's index."""
        return 2 * self.key_dim

    @property
    def tile(self) -> Tile:
        """Sums of some query heads, which read a page's index together."""
        most = self.machine.sums // 2
        return Tile(self.machine.lanes, max(n for n in range(1, most + 1) if self.group % n == 0), 1)


@final
@attrs.define
class NumbaChoose(ChooseKernel):
    """See ChooseKernel; for an index whose meaning is BOUNDS. pages: how many each row reads."""

    bounds: Bounds
    pages: int
    _kernel: Launch = attrs.field(factory=lambda: Launch(alone=_choose_alone, together=_choose_together), init=False)

    def __call__(self, query: Tensor, pages: IndexedPages, *, beside: Tensor | None = None) -> Choice:
        """See ChooseKernel. Scores are summed up in float32, of queries that are not scaled: the order is the same."""
        rows, width = query.shape[:2].numel(), pages.ids.shape[-1]
        query = query.float()
        signs = torch.cat([query.clamp(max=0), query.clamp(min=0)], dim=-1)  # what meets the lower and upper bounds
        columns = torch.empty(*query.shape[:2], min(self.pages, width), dtype=torch.int64)
        self._kernel(
            self.bounds,
            pages.index.data_ptr(),
            signs.data_ptr(),
            pages.ids.contiguous().view(rows, width).numpy(),
            pages.counts.contiguous().view(rows).numpy(),
            columns.view(rows, -1).numpy(),
            query.shape[1],
            workers=workers_for(HALF.itemsize * self.bounds.numbers * rows * width // BYTES_A_WORKER),
        )
        return Choice(columns=columns, reads=pages.counts.clamp(max=self.pages))


def bounds_of(selector: PageSelector, codec: PageCodec, on: Machine, sources: int) -> Bounds | None:
    """What the kernel is compiled for; None for another index, or one that does not fill whole vectors."""
    layer = codec.layer
    meaning = selector.index_form(layer, codec.form.page_size).meaning
    if isinstance(selector, MassSelector) or meaning is not IndexMeaning.BOUNDS or layer.key_dim % on.lanes:
        return None
    return Bounds(machine=on, key_dim=layer.key_dim, group=layer.group, sources=sources)


@numba.njit(cache=True, **COMPILED)
def _choose_alone(
    bounds: Any, index: int, signs: int, ids: Any, counts: Any, columns: Any, heads: int, workers: int
) -> None:
    """index, signs: addresses of float16 [page ids, 2, key_dim] and float32 [rows, group, 2, key_dim]."""
    scores = np.empty(ids.shape, np.float32)
    _score_pages(bounds, index, signs, ids, scores, heads, 0, 1)
    _best_rows(scores, counts, columns, 0, 1)


@numba.njit(parallel=True, cache=True, **COMPILED)
def _choose_together(
    bounds: Any, index: int, signs: int, ids: Any, counts: Any, columns: Any, heads: int, workers: int
) -> None:
    """The same by several workers, each in a thread of numba's."""
    scores = np.empty(ids.shape, np.float32)
    for worker in numba.prange(workers):
        _score_pages(bounds, index, signs, ids, scores, heads, worker, workers)
    for worker in numba.prange(workers):
        _best_rows(scores, counts, columns, worker, workers)


@part
def _score_pages(
    bounds: Any, index: int, signs: int, ids: Any, scores: Any, heads: int, worker: int, workers: int
) -> None:
    """Score a worker's share: page by page of all heads, which were sealed together and lie side by side."""
    rows, width = ids.shape
    first, last = share(rows // heads * width, worker, workers)
    columns_ahead = max(1, PAGES_AHEAD // heads)
    products = np.empty(bounds.group, np.float32)
    for place in range(first, last):
        column = place % width
        for row in range(place // width * heads, (place // width + 1) * heads):
            ahead = ids[row, min(column + columns_ahead, width - 1)]
            scores[row, column] = _score(bounds, index, ids[row, column], ahead, signs, row, products)


@part
def _score(bounds: Any, index: int, page_id: int, ahead_id: int, signs: int, row: int, products: Any) -> Any:
    """The greatest over the group of what no key of the page exceeds in its product with the query."""
    page_bytes, query_bytes = HALF.itemsize * bounds.numbers, FLOAT.itemsize * bounds.numbers
    page, ahead = index + page_bytes * np.int64(page_id), index + page_bytes * np.int64(ahead_id)
    for offset in range(0, page_bytes, 64):
        prefetch_near(ahead + offset)
    for head in range(0, bounds.group, bounds.tile.rows):
        sums = zeros(bounds.tile)
        query = signs + (row * bounds.group + head) * query_bytes
        for number in range(0, bounds.numbers, bounds.tile.lanes):
            vector = load(bounds.tile, HALF, page + HALF.itemsize * number)
            sums = add_products(bounds.tile, sums, query + FLOAT.itemsize * number, query_bytes, vector)
        put_totals(bounds.tile, products.ctypes.data + FLOAT.itemsize * head, FLOAT.itemsize, sums)
    best = np.float32(-np.inf)
    for head in range(bounds.group):
        best = max(best, products[head]) if products[head] == products[head] else np.float32(np.inf)
    return best


@part
def _best_rows(scores: Any, counts: Any, columns: Any, worker: int, workers: int) -> None:
    """Choose for a worker's share of the rows."""
    keys, tally = scores.view(np.int32), np.empty(256, np.int64)
    first, last = share(len(counts), worker, workers)
    for row in range(first, last):
        best(keys, row, counts[row], columns, tally)
