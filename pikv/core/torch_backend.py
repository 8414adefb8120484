"""The torch backend: right for every page form on every device, by decoding. Asked last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, final

import attrs
import torch
from torch import Tensor

from pikv.core import attention
from pikv.core.attention import Partial, finite
from pikv.core.ports.backend import (
    AttendKernel,
    Backend,
    ChooseKernel,
    IndexedPages,
    NewPages,
    PageCodec,
    Pages,
    SealKernel,
)
from pikv.core.ports.selector import PageIndex, PageSelector
from pikv.core.selection import best_pages
from pikv.core.tables import all_live, live_slots
from pikv.core.tail import Tail

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig

BLOCK_TOKENS = 16_384  # tokens of all rows together that are decoded at a time
BLOCK_SCORES = 1 << 22  # scores of all rows together that are held at a time
PAGES_AT_ONCE = 256  # encoded at a time, so that what encoding needs for itself stays small


@final
@attrs.frozen
class TorchBackend(Backend):
    """Decode a block of pages, attend, merge. Pages that lie side by side are read in place."""

    @property
    def name(self) -> str:
        """The name in `describe()`."""
        return "torch"

    def attend(self, codec: PageCodec, device: torch.device) -> AttendKernel:
        """A kernel for any form."""
        return TorchAttend(codec=codec)

    def choose(self, selector: PageSelector, layer: LayerConfig, device: torch.device) -> ChooseKernel:
        """A kernel for any selector."""
        return TorchChoose(selector)

    def seal(self, codec: PageCodec, selector: PageSelector | None, device: torch.device) -> SealKernel:
        """A kernel for any codec and selector."""
        return TorchSeal(codec, selector)


@final
@attrs.define(kw_only=True)
class TorchAttend(AttendKernel):
    """Attention to sealed pages, a block of them at a time, so that what is decoded stays bounded."""

    codec: PageCodec
    _workspace: Tensor | None = attrs.field(default=None, init=False)

    def __call__(
        self, query: Tensor, pages: Pages, *, oldest: Tensor | None = None, page_lse: Tensor | None = None
    ) -> Partial:
        """See AttendKernel."""
        parts = []
        for block in self._blocks(pages, query.shape[2]):
            scores, values = self._scores(query, pages, block, oldest)
            parts.append(_weighted(scores, values))
            if page_lse is not None:
                page_lse[..., block] = scores.logsumexp(-1).movedim(0, -1)
        if not parts:
            return attention.empty(query, self.codec.layer.value_dim)
        return attention.merge(parts)

    def _blocks(self, pages: Pages, queries: int) -> Iterator[slice]:
        sequences, kv_heads, width = pages.rows.shape
        tokens = min(BLOCK_TOKENS, BLOCK_SCORES // max(1, queries))
        columns = max(1, tokens // max(1, sequences * kv_heads * self.codec.form.page_size))
        for start in range(0, width, columns):
            yield slice(start, min(start + columns, width))

    def _scores(self, query: Tensor, pages: Pages, block: slice, oldest: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores [pages, sequences, kv_heads, queries, page_size] and values [pages * sequences * kv_heads, ...]."""
        codec, (sequences, kv_heads) = self.codec, query.shape[:2]
        grid = (block.stop - block.start, sequences, kv_heads)
        stored = self._load(pages, block)  # [pages * sequences * kv_heads, stride], in this order
        keys, values = codec.compressor.decode(codec.form, stored)
        asked = query.expand(grid[0], *query.shape).flatten(0, 2)
        scores = attention.score(asked, keys, scale=codec.layer.scale, softcap=codec.layer.softcap)
        scores = scores.unflatten(0, grid)
        hidden = self._hidden(pages, block, stored, oldest, grid)
        return (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)), values

    def _load(self, pages: Pages, block: slice) -> Tensor:
        rows_a_column = pages.rows.shape[0] * pages.rows.shape[1]
        if pages.run is not None:
            start = pages.run + block.start * rows_a_column
            return pages.slab[start : start + (block.stop - block.start) * rows_a_column]
        rows = pages.rows[..., block].permute(2, 0, 1).flatten()
        if self._workspace is None or len(self._workspace) < len(rows):
            self._workspace = pages.slab.new_empty(len(rows), pages.slab.shape[1])
        out = self._workspace[: len(rows)]
        return torch.index_select(pages.slab, 0, rows, out=out)

    def _hidden(
        self, pages: Pages, block: slice, stored: Tensor, oldest: Tensor | None, grid: tuple[int, ...]
    ) -> Tensor | None:
        """What the queries do not see, broadcastable to [pages, sequences, kv_heads, queries, page_size]."""
        page_size = self.codec.form.page_size
        hidden = None
        live = pages.live[..., block].permute(2, 0, 1)
        if pages.run is None and bool((live != all_live(page_size)).any()):
            hidden = ~live_slots(live, page_size)[..., None, :]
        if oldest is not None:
            positions = self.codec.form.view(stored, "positions").unflatten(0, grid)[..., None, :]
            early = positions < oldest[:, None, :, None]
            hidden = early if hidden is None else hidden | early
        return hidden


def _weighted(scores: Tensor, values: Tensor) -> Partial:
    """The softmax over pages and their slots; see `TorchAttend._scores` for the shapes."""
    highest = finite(scores.amax((0, -1)))
    weights = torch.exp(scores - highest[..., None])
    total = weights.sum((0, -1))
    sums = (weights.flatten(0, 2) @ values.to(weights.dtype)).unflatten(0, scores.shape[:3]).sum(0)
    output = sums / total.masked_fill(total == 0, 1.0)[..., None]
    return Partial(output, highest + total.log())


@final
@attrs.frozen
class TorchChoose(ChooseKernel):
    """Gather the index, let the selector score it, choose the best."""

    selector: PageSelector

    def __call__(self, query: Tensor, pages: IndexedPages) -> Tensor:
        """See ChooseKernel."""
        column = torch.arange(pages.ids.shape[-1])
        present = (column < pages.counts[..., None]).to(pages.ids.device)
        scores = self.selector.score(PageIndex(arrays=pages.index[pages.ids], present=present), query)
        return best_pages(scores, pages.counts, self.selector.pages)


@final
@attrs.frozen
class TorchSeal(SealKernel):
    """Let the compressor encode and the selector index, some pages at a time."""

    codec: PageCodec
    selector: PageSelector | None

    def __call__(self, tail: Tail, new: NewPages, out: Tensor) -> Tensor | None:
        """See SealKernel."""
        form, compressor = self.codec.form, self.codec.compressor
        for start in range(0, len(out), PAGES_AT_ONCE):
            block = slice(start, start + PAGES_AT_ONCE)
            places = (new.sequence[block, None], new.head[block, None], new.slots[block])
            sequence, head, slots = (place.to(out.device) for place in places)
            keys, values, positions = (
                states[sequence, head, slots] for states in (tail.keys, tail.values, tail.positions)
            )
            compressor.encode(form, keys, values, positions, out[block])
        return None if self.selector is None else index_pages(self.codec, self.selector, out)


def index_pages(codec: PageCodec, selector: PageSelector, pages: Tensor) -> Tensor:
    """What the selector keeps of pages uint8 [n, stride]: [n, *shape].

    Of the keys as they decode: a bound on the keys before that would not hold for what is read.
    """
    form = selector.index_form(codec.layer)
    index = torch.empty((len(pages), *form.shape), dtype=form.dtype, device=pages.device)
    for start in range(0, len(pages), PAGES_AT_ONCE):
        block = slice(start, start + PAGES_AT_ONCE)
        selector.index(codec.compressor.decode(codec.form, pages[block])[0], index[block])
    return index
