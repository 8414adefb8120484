"""The choice of pages by bounds on their keys: one kernel scores, one finds the best."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.adapters.cupy_gpu.program import Program, Runner
from pikv.core.ports import Choice, ChooseKernel, IndexedPages, IndexMeaning, MassSelector, PageCodec, PageSelector

PAGES_A_BLOCK, SCORE_THREADS, CHOOSE_THREADS = 32, 256, 256  # as choose.cu has them
MOST_QUERIES, MOST_CHANNELS = 16, 256  # of a group, that its shared memory holds


def choose_program(selector: PageSelector, codec: PageCodec) -> Program | None:
    """The kernels for this selector's index; None for one that they do not know."""
    layer = codec.layer
    meaning = selector.index_form(layer, codec.form.page_size).meaning
    if isinstance(selector, MassSelector) or meaning is not IndexMeaning.BOUNDS:
        return None
    if layer.key_dim % 2 or layer.key_dim > MOST_CHANNELS or layer.group > MOST_QUERIES:
        return None
    return Program("choose.cu", (("KEY_DIM", layer.key_dim),))


@final
@attrs.define
class CupyChoose(ChooseKernel):
    """See ChooseKernel; for an index whose meaning is BOUNDS. pages: how many each row reads."""

    program: Program
    pages: int
    runner: Runner
    _counted: tuple[Tensor, Tensor] | None = attrs.field(default=None, init=False)

    def __call__(self, query: Tensor, pages: IndexedPages, *, beside: Tensor | None = None) -> Choice:
        """See ChooseKernel. Queries are not scaled: the order is the same. Of equal pages the oldest is read."""
        sequences, kv_heads, width = pages.ids.shape
        wanted, rows, group = min(self.pages, width), sequences * kv_heads, query.shape[2]
        columns = pages.ids.new_empty((sequences, kv_heads, wanted), dtype=torch.int64)
        scores = query.new_empty(pages.ids.shape, dtype=torch.float32)
        ids, asked = pages.ids.contiguous(), query.float().contiguous()
        blocks = (-(-width // PAGES_A_BLOCK), rows)
        self.runner.run(self.program, "score", blocks, SCORE_THREADS, (pages.index, ids, asked, scores, group, width))
        arguments = (scores, self._counts_near(pages), columns, width, wanted)
        self.runner.run(self.program, "choose", (rows,), CHOOSE_THREADS, arguments)
        return Choice(columns=columns, reads=pages.counts.clamp(max=self.pages))

    def _counts_near(self, pages: IndexedPages) -> Tensor:
        """The counts on the device: copied once for as long as a layer's pages stay as they are, not at every step."""
        if self._counted is None or self._counted[0] is not pages.counts:
            self._counted = pages.counts, pages.counts.to(pages.ids.device).contiguous()
        return self._counted[1]
