"""Attention to encoded pages by matrix instructions, in parts that a second kernel merges."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.adapters.cupy_gpu.program import Program, Runner
from pikv.core import attention
from pikv.core.attention import Partial
from pikv.core.forms import Affine, Dense, Encoding
from pikv.core.ports import AttendKernel, PageCodec, Pages

DIMS = (32, 64, 128, 192, 256)  # channels that fill whole fragments, and that a warp has registers for
SPLIT_PAGES, MOST_SPLITS = 16, 128  # a row's pages are split into parts of 16 or more, of which there are at most 128
WARPS = 4
_KINDS = {torch.float32: 0, torch.bfloat16: -16, torch.float16: 16}  # of queries, as attend.cu names them
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16"}


def attend_program(codec: PageCodec) -> Program | None:
    """The kernels for these pages; None for a form that they do not know."""
    form, layer = codec.form, codec.layer
    if layer.values != "stored" or layer.key_dim not in DIMS or layer.value_dim not in DIMS:
        return None
    keys, values = _bits(form.keys, min(32, form.page_size)), _bits(form.values, 32)
    if keys is None or values is None:
        return None
    tiles = 2 if layer.group > 8 and layer.value_dim <= 128 else 1  # more would not fit into registers
    offsets = {field.name: field.offset for field in form.fields}
    names = ("keys", "key_scales", "key_zeros", "values", "value_scales", "value_zeros", "positions")
    constants = {
        "KEY_DIM": layer.key_dim,
        "VALUE_DIM": layer.value_dim,
        "PAGE_SIZE": form.page_size,
        "KEY_BITS": keys,
        "VALUE_BITS": values,
        "TILES": tiles,
        "STRIDE": form.stride,
        **{name.upper(): offsets.get(name, 0) for name in names},
    }
    return Program("attend.cu", tuple(constants.items()))


def _bits(encoding: Encoding, group: int) -> int | str | None:
    """How attend.cu names an encoding whose groups have this length; None for one that it does not know."""
    if isinstance(encoding, Dense):
        return _NAMES.get(encoding.dtype)
    known = isinstance(encoding, Affine) and encoding.order == "words" and encoding.group == group
    return encoding.bits if known else None


@final
@attrs.frozen
class CupyAttend(AttendKernel):
    """See AttendKernel. Computed in float32 of products of 16-bit numbers: the queries', and the weights'."""

    codec: PageCodec
    program: Program
    runner: Runner

    def __call__(
        self, query: Tensor, pages: Pages, *, oldest: Tensor | None = None, page_lse: Tensor | None = None
    ) -> Partial:
        """See AttendKernel. Split by the number of pages alone, so that the same pages give the same bits."""
        layer, (sequences, kv_heads, width) = self.codec.layer, pages.rows.shape
        queries, rows = query.shape[2], sequences * kv_heads
        if not width or not query.numel():
            return attention.empty(query, layer.value_dim)
        query = query.contiguous() if query.dtype in _KINDS else query.float().contiguous()
        page_rows, live = pages.rows.contiguous(), pages.live.contiguous()
        bounds = None if oldest is None else oldest.contiguous()
        page_sums = None if page_lse is None else torch.empty_like(page_lse, memory_format=torch.contiguous_format)
        splits = min(MOST_SPLITS, -(-width // SPLIT_PAGES))
        output = query.new_empty((splits, sequences, kv_heads, queries, layer.value_dim), dtype=torch.float32)
        lse = query.new_empty((splits, sequences, kv_heads, queries), dtype=torch.float32)
        at_once = 8 * dict(self.program.constants)["TILES"]
        arguments = (
            pages.slab,
            page_rows,
            live,
            query,
            _KINDS[query.dtype],
            bounds,
            output,
            lse,
            page_sums,
            width,
            queries,
            kv_heads,
            layer.scale,
            layer.softcap or 0.0,
        )
        self.runner.run(self.program, "attend", (splits, rows, -(-queries // at_once)), 32 * WARPS, arguments)
        if page_lse is not None:
            page_lse.copy_(page_sums)
        return Partial(output[0], lse[0]) if splits == 1 else self._merged(output, lse)

    def _merged(self, outputs: Tensor, lses: Tensor) -> Partial:
        output, lse = outputs.new_empty(outputs.shape[1:]), lses.new_empty(lses.shape[1:])
        threads = min(128, output.shape[-1])
        self.runner.run(self.program, "merge", (lse.numel(),), threads, (outputs, lses, output, lse, len(lses)))
        return Partial(output, lse)
