"""Attention to sealed pages by torch alone: decode a block of pages, attend, merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core import attention, fused
from pikv.core.attention import Partial, finite
from pikv.core.ports.backend import AttendKernel, PageCodec, Pages
from pikv.core.tables import all_live, live_slots

BLOCK_TOKENS = 16_384  # tokens of all rows together that are decoded at a time
BLOCK_SCORES = 1 << 22  # scores of all rows together that are held at a time
MANY_QUERIES = 64  # from here on a row's tokens are put side by side for the fused kernel


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
        many = query.shape[2] >= MANY_QUERIES and page_lse is None and fused.serves(query, self.codec.layer.softcap)
        merged = None
        for block in self._blocks(pages, query.shape[2], held=not many or oldest is not None):
            if many:
                part = self._fused(query, pages, block, oldest)
            else:
                scores, values = self._scores(query, pages, block, oldest)
                part = _weighted(scores, values)
                if page_lse is not None:
                    page_lse[..., block] = scores.logsumexp(-1).movedim(0, -1)
            merged = part if merged is None else attention.merge([merged, part])  # one at a time: a prompt's are large
        return attention.empty(query, self.codec.layer.value_dim) if merged is None else merged

    def _blocks(self, pages: Pages, queries: int, *, held: bool) -> Iterator[slice]:
        """Blocks of columns. held: whether a score or a mask of every query and token is held at once."""
        sequences, kv_heads, width = pages.rows.shape
        tokens = min(BLOCK_TOKENS, BLOCK_SCORES // max(1, queries)) if held else BLOCK_TOKENS
        columns = max(1, tokens // max(1, sequences * kv_heads * self.codec.form.page_size))
        for start in range(0, width, columns):
            yield slice(start, min(start + columns, width))

    def _fused(self, query: Tensor, pages: Pages, block: slice, oldest: Tensor | None) -> Partial:
        """Put each row's tokens side by side: to copy them costs little beside what so many queries compute."""
        layer, (keys, values, hidden) = self.codec.layer, self._decode(query, pages, block, oldest)
        rows = [states.permute(1, 2, 0, 3, 4).flatten(2, 3) for states in (keys, values)]
        mask = None if hidden is None else ~hidden.permute(1, 2, 3, 0, 4).flatten(3, 4)
        return fused.attend(query, *rows, scale=layer.scale, mask=mask)

    def _scores(self, query: Tensor, pages: Pages, block: slice, oldest: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores [pages, sequences, kv_heads, queries, page_size] and values, read where they lie."""
        layer, (keys, values, hidden) = self.codec.layer, self._decode(query, pages, block, oldest)
        asked = query.expand(len(keys), *query.shape).flatten(0, 2)
        scores = attention.score(asked, keys.flatten(0, 2), scale=layer.scale, softcap=layer.softcap)
        scores = scores.unflatten(0, keys.shape[:3])
        return (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)), values

    def _decode(
        self, query: Tensor, pages: Pages, block: slice, oldest: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [pages, sequences, kv_heads, page_size, dim] of a block, and what queries do not see."""
        grid = (block.stop - block.start, *query.shape[:2])
        stored = self._load(pages, block)  # [pages * sequences * kv_heads, stride], in this order
        decoded = self.codec.compressor.decode(self.codec.form, stored)
        keys, values = (states.unflatten(0, grid) for states in decoded)
        if pages.basis is not None:
            positions = self.codec.form.view(stored, "positions").unflatten(0, grid)
            keys, values = self.codec.read(keys, values, positions, pages.basis)
        return keys, values, self._hidden(pages, block, stored, oldest, grid)

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
    sums = (weights @ values.to(weights.dtype)).sum(0)
    output = sums / total.masked_fill(total == 0, 1.0)[..., None]
    return Partial(output, highest + total.log())
