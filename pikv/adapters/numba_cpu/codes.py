"""The choice of pages by codes of their keys: who is served, and how torch's tensors reach the compiled kernel."""

from __future__ import annotations

import math
from typing import final

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from pikv.adapters.numba_cpu.launch import Launch, workers_for
from pikv.adapters.numba_cpu.machine import Machine
from pikv.adapters.numba_cpu.masses import Row, Rule, choose_alone, choose_together
from pikv.adapters.numba_cpu.shape import AffineField, ByteField, Scoring
from pikv.adapters.numba_cpu.static import static
from pikv.core.ports import Choice, ChooseKernel, IndexedPages, IndexMeaning, MassSelector, PageCodec, PageSelector

BYTES_A_WORKER = 1 << 15  # of index; fewer are scored sooner than another thread is woken
MOST_ROWS = 8  # query heads that share the reading of a page
EVERYTHING = 2.0  # a mass that is never reached


@static
@attrs.frozen(kw_only=True)
class Codes(Scoring):
    """What the kernel is compiled for. rows: query heads that are served together; `blocks` times as many are a group.

    stride: the bytes of a page's index. sources: of the kernels' source files, so that none compiled from others is
    taken from disk.
    """

    group: int
    stride: int
    keys: AffineField
    sources: int

    @property
    def blocks(self) -> int:
        """How many times `rows` query heads make a group, the last ones of which may be none."""
        return -(-self.group // self.rows)


@final
@attrs.define
class NumbaChooseByCodes(ChooseKernel):
    """See ChooseKernel; for a MassSelector whose index is of CODES."""

    codes: Codes
    selector: MassSelector
    scale: float
    _kernel: Launch = attrs.field(factory=lambda: Launch(alone=choose_alone, together=choose_together), init=False)

    def __call__(self, query: Tensor, pages: IndexedPages, *, beside: Tensor | None = None) -> Choice:
        """See ChooseKernel. Scores are in units of log 2 within, so that weights are powers of 2."""
        codes, (sequences, kv_heads), width = self.codes, query.shape[:2], pages.ids.shape[-1]
        rows = sequences * kv_heads
        query = query.float() * (self.scale / math.log(2.0))
        query = F.pad(query, (0, 0, 0, codes.blocks * codes.rows - codes.group)).contiguous()
        if beside is None:
            beside = query.new_full((rows, codes.group), -torch.inf)
        columns = torch.empty(sequences, kv_heads, min(self.selector.pages, width), dtype=torch.int64)
        reads, left_out = torch.empty(sequences, kv_heads, dtype=torch.int64), torch.empty(sequences, kv_heads)
        table = Row(
            ids=pages.ids.contiguous().view(rows, width).numpy(),
            counts=pages.counts.contiguous().view(rows).numpy(),
            beside=beside.float().contiguous().view(rows, -1).numpy(),
            columns=columns.view(rows, -1).numpy(),
            reads=reads.view(rows).numpy(),
            left_out=left_out.view(rows).numpy(),
        )
        mass = EVERYTHING if self.selector.mass is None else self.selector.mass
        self._kernel(
            codes,
            pages.index.data_ptr(),
            query.data_ptr(),
            table,
            Rule(mass, self.selector.min_pages),
            kv_heads,
            workers=workers_for(max(1, rows * width * codes.stride // BYTES_A_WORKER)),
        )
        return Choice(columns=columns, reads=reads, left_out=left_out)


def codes_of(selector: PageSelector, codec: PageCodec, on: Machine, sources: int) -> Codes | None:
    """What the kernel is compiled for; None for another index, and for what does not fill whole vectors and words."""
    layer, page_size = codec.layer, codec.form.page_size
    form = selector.index_form(layer, page_size)
    if form.meaning is not IndexMeaning.CODES or form.bits is None or not isinstance(selector, MassSelector):
        return None
    if layer.softcap is not None or layer.key_dim % max(on.lanes, 32 // form.bits) or page_size % on.lanes:
        return None
    rows = -(-layer.group // -(-layer.group // min(MOST_ROWS, on.sums // 2)))  # as few more than the group as can be
    field = ByteField if on.dots else AffineField
    keys = field(
        bits=form.bits,
        group=page_size,
        codes=4 * layer.key_dim,
        scales=0,
        zeros=2 * layer.key_dim,
        count=layer.key_dim,
        width=page_size,
        rows=rows,
        machine=on,
    )
    return Codes(
        machine=on,
        rows=rows,
        page_size=page_size,
        key_dim=layer.key_dim,
        group=layer.group,
        stride=form.shape[0],
        keys=keys,
        sources=sources,
    )
