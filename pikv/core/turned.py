"""Kernels for pages in another basis: queries enter it, outputs leave it, and new pages are written in it."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core import attention
from pikv.core.attention import Partial
from pikv.core.basis import Basis
from pikv.core.ports.backend import AttendKernel, Backend, NewPages, PageCodec, Pages, SealKernel, StepKernel
from pikv.core.ports.compressor import UnrotatedCompressor
from pikv.core.ports.selector import PageSelector
from pikv.core.tail import Tail
from pikv.core.torch_backend import PAGES_AT_ONCE, TorchBackend, index_pages


@final
@attrs.frozen
class TurnedAttend(AttendKernel):
    """Attention in the basis of the pages, by a kernel that knows nothing of it."""

    inner: AttendKernel

    def __call__(
        self, query: Tensor, pages: Pages, *, oldest: Tensor | None = None, page_lse: Tensor | None = None
    ) -> Partial:
        """See AttendKernel."""
        basis = _known(pages.basis)
        coordinates = attrs.evolve(pages, basis=None)
        partial = self.inner(basis.enter(query), coordinates, oldest=oldest, page_lse=page_lse)
        return Partial(basis.leave(partial.output), partial.log_sum_exp)


@final
@attrs.frozen
class TurnedStep(StepKernel):
    """The same, by a kernel that also takes a tail. The tail is not in the basis, so it is a launch of its own."""

    inner: StepKernel

    def __call__(
        self, query: Tensor, pages: Pages, *, oldest: Tensor | None = None, page_lse: Tensor | None = None
    ) -> Partial:
        """See AttendKernel."""
        return TurnedAttend(self.inner)(query, pages, oldest=oldest, page_lse=page_lse)

    def step(self, query: Tensor, pages: Pages | None, tail: Tail, *, oldest: Tensor | None = None) -> Partial:
        """See StepKernel."""
        newest = self.inner.step(query, None, tail, oldest=oldest)
        return newest if pages is None else attention.merge([newest, self(query, pages, oldest=oldest)])


@final
@attrs.frozen(kw_only=True)
class TurnedSeal(SealKernel):
    """Sealing of coordinates in the basis, by a kernel that is given them as a tail. The index is of what is decoded.

    codec: of the pages, whose compressor has the basis. inner: made for `coordinates(codec)`, without a selector.
    """

    codec: PageCodec
    inner: SealKernel
    selector: PageSelector | None

    def __call__(self, tail: Tail, new: NewPages, out: Tensor) -> Tensor | None:
        """See SealKernel."""
        for start in range(0, len(out), PAGES_AT_ONCE):
            self._seal(tail, new, slice(start, start + PAGES_AT_ONCE), out)
        if self.selector is None:
            return None
        return index_pages(self.codec, self.selector, out, _known(new.basis).of_pages(new.sequence, new.head))

    def _seal(self, tail: Tail, new: NewPages, block: slice, out: Tensor) -> None:
        sequence, head, slots = new.sequence[block], new.head[block], new.slots[block]
        place = tuple(index.to(out.device) for index in (sequence[:, None], head[:, None], slots))
        keys, values, positions = (states[place] for states in (tail.keys, tail.values, tail.positions))
        keys = self.codec.unrotated(keys, positions)
        keys, values = _known(new.basis).of_pages(sequence, head).write(keys, values)
        count, page_size = slots.shape
        rows = Tail(  # a page a sequence, of one head
            keys[:, None],
            None if tail.own_values is None else values[:, None],
            positions[:, None],
            torch.full((count, 1), page_size),
            values.shape[-1],
        )
        number, zero = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        every = torch.arange(page_size).expand(count, -1)
        self.inner(rows, NewPages(sequence=number, head=zero, slots=every), out[block])


def attend_kernel(backend: Backend, codec: PageCodec, device: torch.device) -> AttendKernel | None:
    """The backend's kernel for these pages, in their basis if they have one; None if it has none.

    Keys that are rotated when they are read meet no query in their basis: torch decodes them.
    """
    if isinstance(codec.compressor, UnrotatedCompressor):
        return backend.attend(codec, device) if isinstance(backend, TorchBackend) else None
    coordinates = codec.coordinates()
    kernel = backend.attend(coordinates or codec, device)
    if coordinates is None or kernel is None:
        return kernel
    # A tail has the layer's own dimensions, which the kernel was not made for if its pages have fewer.
    if isinstance(kernel, StepKernel) and coordinates.layer == codec.layer:
        return TurnedStep(kernel)
    return TurnedAttend(kernel)


def seal_kernel(
    backend: Backend, codec: PageCodec, selector: PageSelector | None, device: torch.device
) -> SealKernel | None:
    """The backend's kernel that writes these pages, in their basis if they have one; None if it has none."""
    coordinates = codec.coordinates()
    if coordinates is None:
        return backend.seal(codec, selector, device)
    kernel = backend.seal(attrs.evolve(coordinates, dtype=torch.float32), None, device)  # as `Basis.write` gives them
    return None if kernel is None else TurnedSeal(codec=codec, inner=kernel, selector=selector)


def _known(basis: Basis | None) -> Basis:
    assert basis is not None  # pages of a BasisCompressor have one
    return basis
