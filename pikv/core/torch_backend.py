"""The torch backend: right for every page form on every device, by decoding. Asked last."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.attention import accumulator
from pikv.core.basis import Basis
from pikv.core.ports.backend import (
    AttendKernel,
    Backend,
    Choice,
    ChooseKernel,
    IndexedPages,
    NewPages,
    PageCodec,
    SealKernel,
)
from pikv.core.ports.selector import MassSelector, PageIndex, PageSelector
from pikv.core.selection import best_pages, heaviest_pages
from pikv.core.tail import Tail
from pikv.core.torch_attend import TorchAttend

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

    def choose(self, selector: PageSelector, codec: PageCodec, device: torch.device) -> ChooseKernel:
        """A kernel for any selector."""
        return TorchChoose(selector, codec)

    def seal(self, codec: PageCodec, selector: PageSelector | None, device: torch.device) -> SealKernel:
        """A kernel for any codec and selector."""
        return TorchSeal(codec, selector)


@final
@attrs.frozen
class TorchChoose(ChooseKernel):
    """Gather the index, let the selector score it, choose the best."""

    selector: PageSelector
    codec: PageCodec

    def __call__(self, query: Tensor, pages: IndexedPages, *, beside: Tensor | None = None) -> Choice:
        """See ChooseKernel."""
        selector, layer = self.selector, self.codec.layer
        column = torch.arange(pages.ids.shape[-1])
        present = (column < pages.counts[..., None]).to(pages.ids.device)
        index = PageIndex(arrays=pages.index[pages.ids], present=present, layer=layer)
        query = query.to(accumulator(query.dtype)) * layer.scale
        if not isinstance(selector, MassSelector):
            return best_pages(selector.score(index, query), pages.counts, selector.pages)
        log_mass = selector.log_mass(index, query)
        return heaviest_pages(
            log_mass,
            log_mass.new_full(log_mass.shape[:3], -torch.inf) if beside is None else beside,
            pages.counts,
            pages=selector.pages,
            mass=selector.mass,
            min_pages=selector.min_pages,
        )


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


def index_pages(codec: PageCodec, selector: PageSelector, pages: Tensor, basis: Basis | None = None) -> Tensor:
    """What the selector keeps of pages uint8 [n, stride]: [n, *shape]. basis: of these pages.

    Of the keys as they decode: a bound on the keys before that would not hold for what is read.
    """
    form = selector.index_form(codec.layer, codec.form.page_size)
    index = torch.empty((len(pages), *form.shape), dtype=form.dtype, device=pages.device)
    for start in range(0, len(pages), PAGES_AT_ONCE):
        block = slice(start, start + PAGES_AT_ONCE)
        keys, values = codec.compressor.decode(codec.form, pages[block])
        if basis is not None:
            keys, _ = codec.read(keys, values, codec.form.view(pages[block], "positions"), basis[block])
        selector.index(keys, index[block])
    return index
