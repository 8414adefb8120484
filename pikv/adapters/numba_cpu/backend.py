"""The backend: which layers its kernels serve, and how torch's tensors reach them."""

from __future__ import annotations

import logging
import math
import threading
import time
import zlib
from pathlib import Path as File
from typing import Any, final

import attrs
import numba
import torch
from numba import types
from torch import Tensor

from pikv.adapters.numba_cpu.attend import attend
from pikv.adapters.numba_cpu.machine import Machine, Path, machine
from pikv.adapters.numba_cpu.shape import AffineField, Call, DenseField, DotField, Shape
from pikv.adapters.numba_cpu.simd import Numbers
from pikv.adapters.numba_cpu.static import Static
from pikv.core.attention import Partial
from pikv.core.forms import Affine, Dense, Encoding
from pikv.core.ports import AttendKernel, Backend, PageCodec, Pages

LOOK_AHEAD = 16_384  # bytes, in whole pages, that memory is fetched ahead
MOST_ROWS = 8  # queries that share the reading of a page
SPLIT_PAGES, MOST_SPLITS = 8, 16  # a row's pages are split into parts of SPLIT_PAGES or more, MOST_SPLITS at most
QUERIES_AT_ONCE = 64  # of a KV head: bounds the scratch memory
_NUMBERS = {
    torch.float32: Numbers("f32", 4),
    torch.bfloat16: Numbers("bf16", 2),
    torch.float16: Numbers("f16", 2),
}
_CALL = types.NamedUniTuple(types.int64, len(Call._fields), Call)
_log = logging.getLogger(__name__)


@final
@attrs.frozen(kw_only=True)
class NumbaCpu(Backend):
    """Attention on a CPU to Dense pages, in place. path: "portable" does without AVX-512."""

    path: Path | None = None

    @property
    def name(self) -> str:
        """The name in `describe()`, with the vectors that are used."""
        return f"numba_cpu {machine(self.path).name}"

    def attend(self, codec: PageCodec, device: torch.device) -> AttendKernel | None:
        """A kernel for Dense pages on the CPU whose value_dim fills whole vectors."""
        shape = shape_of(codec, machine(self.path)) if device.type == "cpu" else None
        return None if shape is None else NumbaAttend(codec=codec, shape=shape)


def shape_of(codec: PageCodec, on: Machine) -> Shape | None:
    """What a kernel for these pages is compiled for; None if there is none."""
    form, layer = codec.form, codec.layer
    most = min(MOST_ROWS, on.sums // 2)
    rows = -(-layer.group // -(-layer.group // most))  # as few more than the group as can be
    keys, values = _field(codec, "key", form.keys, rows, on), _field(codec, "value", form.values, rows, on)
    if keys is None or values is None or layer.softcap is not None:
        return None
    if form.page_size % on.lanes or layer.value_dim % on.lanes:
        return None
    return Shape(
        machine=on,
        page_size=form.page_size,
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        rows=rows,
        stride=form.stride,
        positions=form.field("positions").offset,
        ahead=max(1, round(LOOK_AHEAD / form.stride)),
        keys=keys,
        values=values,
        sources=_sources(),
    )


def _field(codec: PageCodec, name: str, encoding: Encoding, rows: int, on: Machine) -> DenseField | AffineField | None:
    """How keys or values are stored, if kernels know it. rows: of queries."""
    form, layer = codec.form, codec.layer
    if isinstance(encoding, Dense) and encoding.dtype in _NUMBERS:
        return DenseField(numbers=_NUMBERS[encoding.dtype], offset=form.field(f"{name}s").offset)
    if isinstance(encoding, Affine) and encoding.order == "words" and encoding.group % on.lanes == 0:
        codes, scales, zeros = (form.field(f"{name}{part}").offset for part in ("s", "_scales", "_zeros"))
        count, width = (layer.key_dim, form.page_size) if name == "key" else (form.page_size, layer.value_dim)
        field = DotField if on.dots else AffineField
        return field(
            bits=encoding.bits,
            group=encoding.group,
            codes=codes,
            scales=scales,
            zeros=zeros,
            count=count,
            width=width,
            rows=rows,
            machine=on,
        )
    return None


def _sources() -> int:
    """A number that changes with the source files of the kernels."""
    files = sorted(File(__file__).parent.glob("*.py"))
    return zlib.crc32(b"".join(file.read_bytes() for file in files))


class _Memory(threading.local):
    """Scratch memory of one Python thread."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0)

    def address(self, nbytes: int) -> int:
        """Of at least so many bytes; they are overwritten by the thread's next call."""
        if self._tensor.nbytes < nbytes:
            self._tensor = torch.empty(-(-nbytes // 4))
        return self._tensor.data_ptr()


_memory = _Memory()


@final
@attrs.define(kw_only=True)
class NumbaAttend:
    """Attention to pages in place, compiled at the first call."""

    codec: PageCodec
    shape: Shape
    _compiled: Any = attrs.field(default=None, init=False)

    def __call__(self, query: Tensor, pages: Pages, *, oldest: Tensor | None = None) -> Partial:
        """See AttendKernel."""
        parts = [self._attend(block, pages, oldest) for block in query.split(QUERIES_AT_ONCE, dim=2)]
        return parts[0]

    def _attend(self, query: Tensor, pages: Pages, oldest: Tensor | None) -> Partial:
        shape, (sequences, kv_heads, queries) = self.shape, query.shape[:3]
        query = query.float().contiguous()
        output = query.new_empty(sequences, kv_heads, queries, shape.value_dim)
        logs = query.new_empty(sequences, kv_heads, queries)
        rows, live = pages.rows.contiguous(), pages.live.contiguous()
        width = rows.shape[-1]
        workers = min(torch.get_num_threads(), numba.get_num_threads())
        padded = -(-queries // shape.rows) * shape.rows
        splits = min(MOST_SPLITS, -(-width // SPLIT_PAGES))
        scratch = workers * (padded * shape.query_bytes + shape.block_bytes)
        states = sequences * kv_heads * splits * padded * shape.state_bytes
        memory = _memory.address(scratch + states)
        call = Call(
            slab=pages.slab.data_ptr(),
            rows=rows.data_ptr(),
            live=live.data_ptr(),
            query=query.data_ptr(),
            oldest=0 if oldest is None else oldest.contiguous().data_ptr(),
            tail_keys=0,
            tail_values=0,
            tail_positions=0,
            tail_lengths=0,
            output=output.data_ptr(),
            logs=logs.data_ptr(),
            page_logs=0,
            scratch=memory,
            states=memory + scratch,
            heads=kv_heads,
            rows_of_table=sequences * kv_heads,
            pages=width,
            queries=queries,
            padded=padded,
            tail_room=0,
            page_splits=splits,
            tail_splits=0,
            workers=workers,
        )
        self._run(call)
        return Partial(output, logs)

    def _run(self, call: Call) -> None:
        if self._compiled is None:
            started = time.perf_counter()
            self._compiled = attend.compile((Static(self.shape), _CALL, types.float32))
            _log.info("%s: ready in %.1f s", self.shape, time.perf_counter() - started)
        self._compiled(self.shape, call, self.codec.layer.scale / math.log(2.0))
