"""Tiers of main memory: pages in slabs that the processor addresses."""

from __future__ import annotations

import abc
import mmap
from typing import final

import torch
from torch import Tensor

from pikv.core.directory import Directory
from pikv.core.errors import StateError
from pikv.core.ports.memory_tier import AddressableTier, Done, Ticket, check_batch
from pikv.core.slab import HostSlab


class SlabTier(AddressableTier):
    """Pages in slabs of memory, one for each length of page. Which memory is for derived classes to say."""

    def __init__(self, *, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._directory = Directory(capacity_bytes)
        self._slabs: dict[int, HostSlab] | None = {}

    @abc.abstractmethod
    def reserve(self, rows: int, page_bytes: int) -> HostSlab:
        """Return new memory for so many pages, of which nothing is taken before it is written."""

    @property
    def used_bytes(self) -> int:
        """The bytes of all pages held."""
        return self._directory.used_bytes

    def write(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Copy the pages into free rows."""
        check_batch(keys, pages)
        slab = self._slab(pages.shape[1])
        slab[self._directory.add(keys, pages.shape[1])] = pages
        return Done()

    def read(self, keys: Tensor, out: Tensor) -> Ticket:
        """Copy the pages out."""
        check_batch(keys, out)
        slab = self._slab(out.shape[1])
        torch.index_select(slab, 0, self._directory.find(keys, out.shape[1]), out=out)
        return Done()

    def discard(self, keys: Tensor) -> None:
        """Free the rows, and give whole memory pages back to the system."""
        slabs = self._open()
        for page_bytes, run in self._directory.drop(keys):
            start, stop = run.start * page_bytes, run.stop * page_bytes
            slabs[page_bytes].give_back(start, min(stop, start + page_bytes + mmap.PAGESIZE))

    def contains(self, keys: Tensor) -> Tensor:
        """Which keys have a row."""
        self._open()
        return self._directory.contains(keys)

    def slab(self, page_bytes: int) -> Tensor:
        """The memory itself: uint8 [rows, page_bytes]."""
        return self._slab(page_bytes)

    def rows(self, keys: Tensor, page_bytes: int) -> Tensor:
        """The slab rows of keys."""
        self._open()
        return self._directory.find(keys, page_bytes)

    def check_integrity(self) -> None:
        """Raise StateError unless every row is free or one page's."""
        self._open()
        self._directory.check_integrity()

    def close(self) -> None:
        """Let go of the memory."""
        self._slabs = None

    def _open(self) -> dict[int, HostSlab]:
        if self._slabs is None:
            raise StateError(f"{type(self).__name__}: it is closed; make another")
        return self._slabs

    def _slab(self, page_bytes: int) -> Tensor:
        slabs = self._open()
        if page_bytes not in slabs:
            slabs[page_bytes] = self.reserve(self._directory.rows_of(page_bytes), page_bytes)
        return slabs[page_bytes].tensor


@final
class HostTier(SlabTier):
    """Main memory that the system places as it likes; address space is reserved at once, memory is taken as written."""

    def reserve(self, rows: int, page_bytes: int) -> HostSlab:
        """Ordinary memory."""
        return HostSlab(rows, page_bytes)
