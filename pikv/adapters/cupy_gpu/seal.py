"""Writing pages: taken from the tail, encoded and, where bounds on their keys are wanted, indexed, by one kernel."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.adapters.cupy_gpu.program import Program, Runner
from pikv.core.forms import Affine, Dense, Encoding
from pikv.core.ports import FormCompressor, IndexMeaning, NewPages, PageCodec, PageSelector, SealKernel
from pikv.core.tail import Tail
from pikv.core.torch_backend import index_pages

THREADS, MOST_CHANNELS = 256, 256  # as seal.cu has them
_NUMBERS = {torch.float32: "0", torch.bfloat16: "BF16", torch.float16: "F16"}
_ORDERS = {"plain": 0, "words": 1}
_FIELDS = ("keys", "key_scales", "key_zeros", "values", "value_scales", "value_zeros", "positions")


def seal_program(codec: PageCodec, selector: PageSelector | None) -> Program | None:
    """The kernel for these pages; None for bytes that are more than their form says, or that it does not know."""
    form, layer = codec.form, codec.layer
    if not isinstance(codec.compressor, FormCompressor) or codec.dtype not in _NUMBERS or layer.values != "stored":
        return None
    sides = _side("KEY", form.keys, codec.dtype), _side("VALUE", form.values, codec.dtype)
    if sides[0] is None or sides[1] is None or max(layer.key_dim, layer.value_dim) > MOST_CHANNELS:
        return None
    offsets = {field.name: field.offset for field in form.fields}
    constants = {
        "KEY_DIM": layer.key_dim,
        "VALUE_DIM": layer.value_dim,
        "PAGE_SIZE": form.page_size,
        "NUMBERS": _NUMBERS[codec.dtype],
        **sides[0],
        **sides[1],
        "STRIDE": form.stride,
        "BOUNDS": int(_bounded(selector, codec)),
        **{name.upper(): offsets.get(name, 0) for name in _FIELDS},
    }
    return Program("seal.cu", tuple(constants.items()))


def _side(name: str, encoding: Encoding, dtype: torch.dtype) -> dict[str, int | str] | None:
    if encoding == Dense(dtype):
        bits, group, order = 0, 0, 0
    elif isinstance(encoding, Affine) and encoding.order in _ORDERS:
        bits, group, order = encoding.bits, encoding.group, _ORDERS[encoding.order]
    else:
        return None
    return {f"{name}_BITS": bits, f"{name}_GROUP": group, f"{name}_ORDER": order}


def _bounded(selector: PageSelector | None, codec: PageCodec) -> bool:
    if selector is None:
        return False
    return selector.index_form(codec.layer, codec.form.page_size).meaning is IndexMeaning.BOUNDS


@final
@attrs.frozen
class CupySeal(SealKernel):
    """See SealKernel. The kernel writes an index of bounds too; for others the selector is asked.

    Waits for the kernel, to say whether it could hold all numbers.
    """

    codec: PageCodec
    selector: PageSelector | None
    program: Program
    runner: Runner

    def __call__(self, tail: Tail, new: NewPages, out: Tensor) -> Tensor | None:
        """See SealKernel."""
        layer, bounds = self.codec.layer, _bounded(self.selector, self.codec)
        index = torch.empty(len(out) * bounds, 2, layer.key_dim, dtype=torch.float16, device=out.device)
        refused = torch.zeros(len(out), dtype=torch.int32, device=out.device)
        places = [each.to(out.device).contiguous() for each in (new.sequence, new.head, new.slots)]
        states, (_, heads, room, _) = (tail.keys, tail.values, tail.positions), tail.keys.shape
        arguments = (*states, *places, out, index, refused, heads, room)
        self.runner.run(self.program, "seal", (len(out),), THREADS, arguments)
        if bool(refused.any()):
            self._refuse(tail, new, out, int(refused.argmax()))
        if self.selector is None or bounds:
            return index if bounds else None
        return index_pages(self.codec, self.selector, out)

    def _refuse(self, tail: Tail, new: NewPages, out: Tensor, page: int) -> None:
        """Have the compressor say why it cannot hold a page."""
        place = tuple(each.to(out.device) for each in (new.sequence[page], new.head[page], new.slots[page]))
        keys, values, positions = (states[place][None] for states in (tail.keys, tail.values, tail.positions))
        self.codec.compressor.encode(self.codec.form, keys, values, positions, out[page : page + 1])
        raise AssertionError("the compressor holds what the kernel refused")
