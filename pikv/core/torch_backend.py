"""The torch backend: right for every page form on every device, by decoding. Asked last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core import attention, fused
from pikv.core.attention import Partial, finite
from pikv.core.ports.backend import AttendKernel, Backend, PageCodec, Pages
from pikv.core.tables import all_live, live_slots

BLOCK_TOKENS = 16_384  # tokens of all rows together that are decoded at a time
BLOCK_SCORES = 1 << 22  # scores of all rows together that are held at a time
MANY_QUERIES = 64  # from here on a row's tokens are put side by side for the fused kernel


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


@final
@attrs.define(kw_only=True)
class TorchAttend:
    """Attention to sealed pages, a block of them at a time, so that what is decoded stays bounded."""

    codec: PageCodec
    _workspace: Tensor | None = attrs.field(default=None, init=False)

    def __call__(self, query: Tensor, pages: Pages, *, oldest: Tensor | None = None) -> Partial:
        """See AttendKernel."""
        merged = None
        for block in self._blocks(pages, query.shape[2], masked=oldest is not None):
            part = self._attend_block(query, pages, block, oldest)
            merged = part if merged is None else attention.merge([merged, part])  # one at a time: a prompt's are large
        return attention.empty(query, self.codec.layer.value_dim) if merged is None else merged

    def _blocks(self, pages: Pages, queries: int, *, masked: bool) -> Iterator[slice]:
        sequences, kv_heads, width = pages.rows.shape
        tokens = BLOCK_TOKENS
        if masked or queries < MANY_QUERIES:
            tokens = min(tokens, BLOCK_SCORES // max(1, queries))
        columns = max(1, tokens // max(1, sequences * kv_heads * self.codec.form.page_size))
        for start in range(0, width, columns):
            yield slice(start, min(start + columns, width))

    def _attend_block(self, query: Tensor, pages: Pages, block: slice, oldest: Tensor | None) -> Partial:
        codec = self.codec
        grid = (block.stop - block.start, *query.shape[:2])
        stored = self._load(pages, block)  # [pages * sequences * kv_heads, stride], in this order
        keys, values = codec.compressor.decode(codec.form, stored)
        hidden = self._hidden(pages, block, stored, oldest, grid)
        if query.shape[2] >= MANY_QUERIES:
            return self._attend_many(query, keys.unflatten(0, grid), values.unflatten(0, grid), hidden)
        return self._attend_few(query, keys, values, hidden, grid)

    def _attend_many(self, query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Partial:
        """Put each row's tokens side by side: to copy them costs little beside what so many queries compute.

        keys and values [pages, sequences, kv_heads, page_size, dim].
        """
        keys, values = (states.permute(1, 2, 0, 3, 4).flatten(2, 3) for states in (keys, values))
        mask = None if hidden is None else ~hidden.permute(1, 2, 3, 0, 4).flatten(3, 4)
        layer = self.codec.layer
        return fused.attend(query, keys, values, scale=layer.scale, softcap=layer.softcap, mask=mask)

    def _attend_few(
        self, query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, grid: tuple[int, ...]
    ) -> Partial:
        """Read the pages where they lie: keys and values [pages * sequences * kv_heads, page_size, dim]."""
        layer = self.codec.layer
        asked = query.expand(grid[0], *query.shape).flatten(0, 2)
        scores = attention.score(asked, keys, scale=layer.scale, softcap=layer.softcap)
        scores = scores.unflatten(0, grid)  # [pages, sequences, kv_heads, queries, page_size]
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        highest = finite(scores.amax((0, -1)))
        weights = torch.exp(scores - highest[..., None])
        total = weights.sum((0, -1))
        sums = (weights.flatten(0, 2) @ values.to(weights.dtype)).unflatten(0, grid).sum(0)
        output = sums / total.masked_fill(total == 0, 1.0)[..., None]
        return Partial(output, highest + total.log())

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
