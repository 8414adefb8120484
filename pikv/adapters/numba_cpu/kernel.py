"""How torch's tensors reach the compiled kernel: addresses and counts, and memory to work in."""

from __future__ import annotations

import math
import threading
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.adapters.numba_cpu.attend import attend_alone, attend_together
from pikv.adapters.numba_cpu.launch import Launch, workers_for
from pikv.adapters.numba_cpu.query import KINDS
from pikv.adapters.numba_cpu.shape import NUMBERS, Call, Shape
from pikv.core.attention import Partial
from pikv.core.ports import PageCodec, Pages, StepKernel
from pikv.core.tail import Tail

# A row's pages are split into parts of SPLIT_PAGES or more, its tail into parts of SPLIT_TOKENS or more; at most into
# MOST_SPLITS. More parts share out more evenly, and each has sums of its own to write and to merge.
SPLIT_PAGES, SPLIT_TOKENS, MOST_SPLITS = 8, 512, 16
BYTES_A_WORKER = 1 << 18  # read in about as long as it takes to wake another thread and to wait for it
QUERIES_AT_ONCE = 64  # of a KV head: bounds the memory to work in

_NO_PAGES = Pages(
    slab=torch.empty(0, 0, dtype=torch.uint8),
    rows=torch.empty(0, 0, 0, dtype=torch.int32),
    live=torch.empty(0, 0, 0, dtype=torch.int64),
    run=None,
)


class _Memory(threading.local):
    """Memory that one Python thread's kernels work in."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0)

    def address(self, nbytes: int) -> int:
        """Of at least so many bytes, which the thread's next call overwrites."""
        if self._tensor.nbytes < nbytes:
            self._tensor = torch.empty(-(-nbytes // 4))
        return self._tensor.data_ptr()


_memory = _Memory()


@final
@attrs.define(kw_only=True)
class NumbaAttend(StepKernel):
    """Attention to pages in place, and to the tail. Compiled at the first call, or taken from disk; the log says so."""

    codec: PageCodec
    shape: Shape
    _launch: Launch = attrs.field(factory=lambda: Launch(alone=attend_alone, together=attend_together), init=False)

    def __call__(
        self, query: Tensor, pages: Pages, *, oldest: Tensor | None = None, page_lse: Tensor | None = None
    ) -> Partial:
        """See AttendKernel."""
        parts = []
        for start in range(0, max(1, query.shape[2]), QUERIES_AT_ONCE):
            block = slice(start, start + QUERIES_AT_ONCE)
            bounds = None if oldest is None else oldest[:, block]
            wanted = None if page_lse is None else torch.empty_like(page_lse[:, :, block])
            parts.append(self._attend(query[:, :, block], pages, None, bounds, wanted))
            if page_lse is not None and wanted is not None:
                page_lse[:, :, block] = wanted
        if len(parts) == 1:
            return parts[0]
        return Partial(
            torch.cat([part.output for part in parts], 2), torch.cat([part.log_sum_exp for part in parts], 2)
        )

    def step(self, query: Tensor, pages: Pages | None, tail: Tail, *, oldest: Tensor | None = None) -> Partial:
        """See StepKernel."""
        return self._attend(query, _NO_PAGES if pages is None else pages, tail, oldest, None)

    def _attend(
        self, query: Tensor, pages: Pages, tail: Tail | None, oldest: Tensor | None, page_lse: Tensor | None
    ) -> Partial:
        shape, (sequences, kv_heads, queries, _) = self.shape, query.shape
        query = query.contiguous() if query.dtype in NUMBERS else query.float().contiguous()
        rows, live, width = pages.rows.contiguous(), pages.live.contiguous(), pages.rows.shape[2]
        oldest = None if oldest is None else oldest.contiguous()
        output = torch.empty((sequences, kv_heads, queries, shape.value_dim))
        lse = torch.empty((sequences, kv_heads, queries))
        # Parts by lengths alone: what comes out must not depend on the number of threads.
        page_splits = min(MOST_SPLITS, -(-width // SPLIT_PAGES))
        tail_splits = 0 if tail is None else min(MOST_SPLITS, -(-tail.width // SPLIT_TOKENS))
        jobs = sequences * kv_heads * (page_splits + tail_splits)
        nbytes = width * shape.stride + (0 if tail is None else tail.width * shape.tail_bytes)
        workers = workers_for(min(jobs, 1 + sequences * kv_heads * nbytes // BYTES_A_WORKER))
        padded = -(-queries // shape.rows) * shape.rows
        states = jobs * padded * shape.state_bytes
        memory = _memory.address(states + workers * (padded * shape.query_bytes + shape.block_bytes))
        call = Call(
            slab=pages.slab.data_ptr(),
            rows=rows.data_ptr(),
            live=live.data_ptr(),
            query=query.data_ptr(),
            oldest=0 if oldest is None else oldest.data_ptr(),
            tail_keys=0 if tail is None else tail.keys.data_ptr(),
            tail_values=0 if tail is None else tail.values.data_ptr(),
            tail_positions=0 if tail is None else tail.positions.data_ptr(),
            tail_lengths=0 if tail is None else tail.lengths.data_ptr(),
            output=output.data_ptr(),
            lse=lse.data_ptr(),
            page_lse=0 if page_lse is None else page_lse.data_ptr(),
            states=memory,
            scratch=memory + states,
            query_kind=KINDS.index(NUMBERS[query.dtype]),
            table_rows=sequences * kv_heads,
            heads=kv_heads,
            pages=width,
            queries=queries,
            padded=padded,
            tail_room=0 if tail is None else tail.keys.shape[2],
            page_splits=page_splits,
            tail_splits=tail_splits,
        )
        self._launch(self.shape, call, self.codec.layer.scale / math.log(2.0), workers=workers)
        return Partial(output, lse)
