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

from pikv.adapters.numba_cpu.compiled import INLINED, compiled
from pikv.adapters.numba_cpu.launch import Launch
from pikv.adapters.numba_cpu.machine import Machine
from pikv.adapters.numba_cpu.shape import FLOAT
from pikv.adapters.numba_cpu.simd import Numbers, fma, load, prefetch_near, splat, total
from pikv.adapters.numba_cpu.static import static
from pikv.adapters.numba_cpu.tiles import Tile
from pikv.core.config import LayerConfig
from pikv.core.ports import ChooseKernel, IndexedPages, IndexMeaning, PageSelector

HALF = Numbers("f16", 2)
PAGES_A_JOB = 64
PAGES_AHEAD = 8  # that the index is fetched for before it is read
PARALLEL_BYTES = 1 << 18  # of index; less is scored sooner by one thread than by waking another


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
    def line(self) -> Tile:
        """One vector."""
        return Tile(self.machine.lanes, 1, 1)


@final
@attrs.define
class NumbaChoose(ChooseKernel):
    """See ChooseKernel; for an index whose meaning is BOUNDS. pages: how many each row reads."""

    bounds: Bounds
    pages: int
    _kernel: Launch = attrs.field(factory=lambda: Launch(_choose), init=False)

    def __call__(self, query: Tensor, pages: IndexedPages) -> Tensor:
        """See ChooseKernel. Scores are summed up in float32."""
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
            _workers(2 * self.bounds.numbers * rows * width),
        )
        return columns


def bounds_of(selector: PageSelector, layer: LayerConfig, on: Machine, sources: int) -> Bounds | None:
    """What the kernel is compiled for; None for another index, or one that does not fill whole vectors."""
    if selector.index_form(layer).meaning is not IndexMeaning.BOUNDS or layer.key_dim % on.lanes:
        return None
    return Bounds(machine=on, key_dim=layer.key_dim, group=layer.group, sources=sources)


def _workers(nbytes: int) -> int:
    return min(numba.get_num_threads(), torch.get_num_threads()) if nbytes >= PARALLEL_BYTES else 1


@numba.njit(parallel=True, cache=True, **INLINED)
def _choose(bounds: Any, index: int, signs: int, ids: Any, counts: Any, columns: Any, workers: int) -> None:
    """index, signs: addresses of float16 [page ids, 2, key_dim] and float32 [rows, group, 2, key_dim]."""
    rows, width = ids.shape
    scores = np.empty((rows, width), np.float32)
    jobs_a_row = (width + PAGES_A_JOB - 1) // PAGES_A_JOB
    jobs = rows * jobs_a_row
    for worker in numba.prange(workers):
        for job in range(jobs * worker // workers, jobs * (worker + 1) // workers):
            _score(bounds, index, signs, ids, scores, job // jobs_a_row, job % jobs_a_row * PAGES_A_JOB)
    keys = scores.view(np.int32)
    for worker in numba.prange(workers):
        tally = np.empty(256, np.int64)
        for row in range(rows * worker // workers, rows * (worker + 1) // workers):
            _best(keys, row, counts[row], columns, tally)


@compiled
def _score(bounds: Any, index: int, signs: int, ids: Any, scores: Any, row: int, first: int) -> None:
    """Score PAGES_A_JOB pages of a row from the first on."""
    last = min(first + PAGES_A_JOB, ids.shape[1])
    for column in range(first, last):
        page = index + HALF.itemsize * bounds.numbers * np.int64(ids[row, column])
        ahead = index + HALF.itemsize * bounds.numbers * np.int64(ids[row, min(column + PAGES_AHEAD, last - 1)])
        for offset in range(0, HALF.itemsize * bounds.numbers, 64):
            prefetch_near(ahead + offset)
        best = np.float32(-np.inf)
        for head in range(bounds.group):
            score = _bound(bounds, page, signs + FLOAT.itemsize * bounds.numbers * (row * bounds.group + head))
            best = max(best, score) if score == score else np.float32(np.inf)
        scores[row, column] = best


@compiled
def _bound(bounds: Any, page: int, signs: int) -> Any:
    """What no key of the page exceeds in its product with a query."""
    line = bounds.line
    even, odd = splat(line, 0.0), splat(line, 0.0)
    for at in range(0, bounds.numbers, 2 * line.lanes):
        even = fma(load(line, HALF, page + 2 * at), load(line, FLOAT, signs + 4 * at), even)
        at += line.lanes
        odd = fma(load(line, HALF, page + 2 * at), load(line, FLOAT, signs + 4 * at), odd)
    return total(even) + total(odd)


@compiled
def _best(keys: Any, row: int, count: int, columns: Any, tally: Any) -> None:
    """Write the columns of the newest and of the best pages, in order. keys: the bits of their scores, changed."""
    wanted = columns.shape[1]
    if count <= wanted:
        for column in range(wanted):
            columns[row, column] = column
        return
    for column in range(count):  # numbers that are in the order of the scores
        bits = keys[row, column]
        keys[row, column] = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys[row, count - 1] = 0x7FFFFFFF
    least, equals = _threshold(keys, row, count, wanted, tally)
    place = 0
    for column in range(count):
        key = keys[row, column]
        if key > least or (key == least and equals > 0):
            equals -= key == least
            columns[row, place] = column
            place += 1


@compiled
def _threshold(keys: Any, row: int, count: int, wanted: int, tally: Any) -> Any:
    """The `wanted` greatest key, and how many equal to it are wanted: digit by digit, counting."""
    known, mask, missing = np.int64(0), np.int64(0), wanted
    for shift in (24, 16, 8, 0):
        tally[:] = 0
        for column in range(count):
            key = np.int64(keys[row, column]) + 0x80000000
            if key & mask == known:
                tally[(key >> shift) & 255] += 1
        digit = 255
        while tally[digit] < missing:
            missing -= tally[digit]
            digit -= 1
        known |= digit << shift
        mask |= 255 << shift
    return known - 0x80000000, missing
