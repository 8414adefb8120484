"""Writing pages: taken from the tail, encoded and, where bounds on their keys are wanted, indexed, in one call.

The bytes are those that the form says, and so those that torch writes, whatever the number of threads.
"""

from __future__ import annotations

from typing import Any, final

import attrs
import torch
from torch import Tensor

from pikv.adapters.numba_cpu.launch import Launch, workers_for
from pikv.adapters.numba_cpu.shape import NUMBERS
from pikv.adapters.numba_cpu.write import Side, Source, Stored, Target, write_alone, write_together
from pikv.core.forms import Affine, Dense, Encoding, PageForm
from pikv.core.ports import FormCompressor, IndexMeaning, NewPages, PageCodec, PageSelector, SealKernel
from pikv.core.tail import Tail
from pikv.core.torch_backend import index_pages


def sides_of(codec: PageCodec) -> tuple[Side, Side] | None:
    """How pages of this codec are written, keys and values; None for pages that the kernel does not know."""
    form, layer, dtype = codec.form, codec.layer, codec.dtype
    keys = _side(form, "keys", form.keys, (form.page_size, layer.key_dim), dtype)
    values = _side(form, "values", form.values, (layer.value_dim, form.page_size), dtype)
    if not isinstance(codec.compressor, FormCompressor) or dtype not in NUMBERS or layer.values != "stored":
        return None
    if keys is None or values is None:
        return None
    return keys, values


def _side(form: PageForm, name: str, encoding: Encoding, shape: tuple[int, int], dtype: torch.dtype) -> Side | None:
    along_tokens, (entries, runs) = int(name == "keys"), shape
    if encoding == Dense(dtype):
        bits = group = words = scales = zeros = 0
    elif isinstance(encoding, Affine) and encoding.order in ("plain", "words"):
        bits, group, words = encoding.bits, encoding.group, int(encoding.order == "words")
        scales, zeros = (form.field(f"{name[:-1]}_{part}").offset for part in ("scales", "zeros"))
    else:
        return None
    return Side(
        along_tokens=along_tokens,
        entries=entries,
        runs=runs,
        bits=bits,
        group=group,
        words=words,
        codes=form.field(name).offset,
        scales=scales,
        zeros=zeros,
    )


@final
@attrs.define
class NumbaSeal(SealKernel):
    """See SealKernel. The kernel writes an index of bounds too; for others the selector is asked."""

    stored: Stored
    sides: tuple[Side, Side]
    codec: PageCodec
    selector: PageSelector | None
    _kernel: Launch = attrs.field(factory=lambda: Launch(alone=write_alone, together=write_together), init=False)

    def __call__(self, tail: Tail, new: NewPages, out: Tensor) -> Tensor | None:
        """See SealKernel."""
        layer, page_size = self.codec.layer, self.codec.form.page_size
        kept = None if self.selector is None else self.selector.index_form(layer, page_size)
        bounds = kept is not None and kept.meaning is IndexMeaning.BOUNDS
        index = torch.empty(len(out) * bounds, 2, layer.key_dim, dtype=torch.float16)
        written = torch.zeros(len(out), dtype=torch.bool)
        source = Source(
            keys=_bits(tail.keys),
            values=_bits(tail.values),
            positions=tail.positions.flatten(0, 1).numpy(),
            row=(new.sequence * tail.keys.shape[1] + new.head).numpy(),
            slots=new.slots.contiguous().numpy(),
        )
        types = (torch.uint8, torch.int16, torch.int32)
        target = Target(*(out.view(dtype).numpy() for dtype in types), bounds=index.view(torch.int16).numpy())
        positions = self.codec.form.field("positions").offset
        self._kernel(
            self.stored, *self.sides, positions, source, target, written.numpy(), workers=workers_for(len(out))
        )
        if not bool(written.all()):
            self._refuse(tail, new, out, int(written.int().argmin()))
        if bounds or self.selector is None:
            return index if bounds else None
        return index_pages(self.codec, self.selector, out)

    def _refuse(self, tail: Tail, new: NewPages, out: Tensor, page: int) -> None:
        """Have the compressor say why it cannot hold a page."""
        place = (new.sequence[page], new.head[page], new.slots[page])
        keys, values, positions = (states[place][None] for states in (tail.keys, tail.values, tail.positions))
        self.codec.compressor.encode(self.codec.form, keys, values, positions, out[page : page + 1])
        raise AssertionError("the compressor holds what the kernel refused")


def _bits(states: Tensor) -> Any:
    """States [sequences, kv_heads, ...] as whole numbers of as many bits: [sequences * kv_heads, ...]."""
    return states.view(torch.int32 if states.itemsize == 4 else torch.int16).flatten(0, 1).numpy()
