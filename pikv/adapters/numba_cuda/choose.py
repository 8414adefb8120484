"""The choice of pages by bounds on their keys: one block scores a row's pages and ranks them."""

from __future__ import annotations

import functools
import math
from typing import final

import attrs
import torch
from numba import cuda
from torch import Tensor

from pikv.adapters.numba_cuda.launch import launch
from pikv.adapters.numba_cuda.numbers import from_half
from pikv.adapters.numba_cuda.pages import bits_of
from pikv.core.ports import Choice, ChooseKernel, IndexedPages, IndexMeaning, MassSelector, PageCodec, PageSelector

THREADS = 32
LARGEST = 3.4028234663852886e38  # of finite float32s; a row's newest page alone scores more


def chooses(selector: PageSelector, codec: PageCodec) -> bool:
    """Whether the kernel knows what this selector's index means."""
    meaning = selector.index_form(codec.layer, codec.form.page_size).meaning
    return meaning is IndexMeaning.BOUNDS and not isinstance(selector, MassSelector)


@final
@attrs.frozen
class NumbaCudaChoose(ChooseKernel):
    """See ChooseKernel; for an index whose meaning is BOUNDS. pages: how many each row reads."""

    codec: PageCodec
    pages: int

    def __call__(self, query: Tensor, pages: IndexedPages, *, beside: Tensor | None = None) -> Choice:
        """See ChooseKernel. Queries are not scaled: the order is the same. Of equal pages the oldest is read."""
        sequences, kv_heads, width = pages.ids.shape
        columns = pages.ids.new_empty((sequences, kv_heads, min(self.pages, width)), dtype=torch.int64)
        counts = pages.counts.to(pages.ids.device)
        launch(
            choose_kernel(self.codec.layer.key_dim),
            (sequences, kv_heads),
            THREADS,
            bits_of(pages.index),
            pages.ids,
            counts,
            query.float(),
            query.new_empty(pages.ids.shape, dtype=torch.float32),
            columns,
        )
        return Choice(columns=columns, reads=pages.counts.clamp(max=self.pages))


@functools.cache
def choose_kernel(key_dim: int):
    """The kernel for keys of so many channels."""

    @cuda.jit(device=True)
    def score(index, page, query):
        """The greatest over the group of what no key of the page exceeds in its product with the query."""
        best = -LARGEST
        for q in range(query.shape[0]):
            bound = 0.0
            for channel in range(key_dim):
                asked = query[q, channel]
                bound += min(asked, 0.0) * from_half(index[page, 0, channel])
                bound += max(asked, 0.0) * from_half(index[page, 1, channel])
            best = max(best, bound) if bound <= LARGEST else LARGEST  # no number, or infinite: it has to be read
        return best

    @cuda.jit(device=True)
    def rank(scores, column, count):
        """How many of a row's pages are read before this one."""
        better = 0
        for other in range(count):
            better += scores[other] > scores[column] or (scores[other] == scores[column] and other < column)
        return better

    @cuda.jit
    def choose(index, ids, counts, query, scores, columns):
        """One block for each row; scores float32 [sequences, kv_heads, pages] are memory to work in."""
        sequence, head, first = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        count, wanted = counts[sequence, head], columns.shape[2]
        for column in range(first, count, THREADS):
            scores[sequence, head, column] = score(index, ids[sequence, head, column], query[sequence, head])
        cuda.syncthreads()
        if first == 0 and count:
            scores[sequence, head, count - 1] = math.inf
        cuda.syncthreads()
        for column in range(first, count, THREADS):
            if rank(scores[sequence, head], column, count) < wanted:
                place = 0
                for before in range(column):
                    place += rank(scores[sequence, head], before, count) < wanted
                columns[sequence, head, place] = column
        for place in range(count + first, wanted, THREADS):
            columns[sequence, head, place] = place

    return choose
