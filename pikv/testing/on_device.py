"""Let suites whose tensors lie on the CPU try a backend's kernels on another device."""

from __future__ import annotations

from typing import Any, final

import attrs
import torch
from torch import Tensor

from pikv.core.attention import Partial
from pikv.core.ports import (
    AttendKernel,
    Backend,
    Choice,
    ChooseKernel,
    IndexedPages,
    NewPages,
    PageCodec,
    Pages,
    PageSelector,
    SealKernel,
)
from pikv.core.tail import Tail


@final
@attrs.frozen
class OnDevice(Backend):
    """The backend's kernels for a device, asked for on the CPU: what they take goes there, what they give comes back.

    A step that takes the tail along is not among them.
    """

    backend: Backend
    device: torch.device

    @property
    def name(self) -> str:
        """The backend's."""
        return self.backend.name

    def attend(self, codec: PageCodec, device: torch.device) -> AttendKernel | None:
        """Its kernel for the device."""
        kernel = self.backend.attend(codec, self.device) if device.type == "cpu" else None
        return None if kernel is None else _Attend(kernel, self.device)

    def choose(self, selector: PageSelector, codec: PageCodec, device: torch.device) -> ChooseKernel | None:
        """Its kernel for the device."""
        kernel = self.backend.choose(selector, codec, self.device) if device.type == "cpu" else None
        return None if kernel is None else _Choose(kernel, self.device)

    def seal(self, codec: PageCodec, selector: PageSelector | None, device: torch.device) -> SealKernel | None:
        """Its kernel for the device."""
        kernel = self.backend.seal(codec, selector, self.device) if device.type == "cpu" else None
        return None if kernel is None else _Seal(kernel, self.device)


@attrs.frozen
class _Attend(AttendKernel):
    kernel: AttendKernel
    device: torch.device

    def __call__(
        self, query: Tensor, pages: Pages, *, oldest: Tensor | None = None, page_lse: Tensor | None = None
    ) -> Partial:
        there = None if page_lse is None else page_lse.to(self.device)
        moved = Pages(**_moved(pages, self.device, "slab", "rows", "live"), run=pages.run)
        bounds = None if oldest is None else oldest.to(self.device)
        partial = self.kernel(query.to(self.device), moved, oldest=bounds, page_lse=there)
        if page_lse is not None and there is not None:
            page_lse.copy_(there)
        return Partial(partial.output.cpu(), partial.log_sum_exp.cpu())


@attrs.frozen
class _Choose(ChooseKernel):
    kernel: ChooseKernel
    device: torch.device

    def __call__(self, query: Tensor, pages: IndexedPages, *, beside: Tensor | None = None) -> Choice:
        moved = IndexedPages(**_moved(pages, self.device, "index", "ids"), counts=pages.counts)
        about = None if beside is None else beside.to(self.device)
        choice = self.kernel(query.to(self.device), moved, beside=about)
        left_out = None if choice.left_out is None else choice.left_out.cpu()
        return Choice(columns=choice.columns.cpu(), reads=choice.reads.cpu(), left_out=left_out)


@attrs.frozen
class _Seal(SealKernel):
    kernel: SealKernel
    device: torch.device

    def __call__(self, tail: Tail, new: NewPages, out: Tensor) -> Tensor | None:
        states = _moved(tail, self.device, "keys", "own_values", "positions")
        there = out.to(self.device)
        index = self.kernel(Tail(**states, lengths=tail.lengths, value_dim=tail.value_dim), new, there)
        out.copy_(there)
        return None if index is None else index.cpu()


def _moved(owner: Any, device: torch.device, *names: str) -> dict[str, Any]:
    tensors = {name: getattr(owner, name) for name in names}
    return {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
