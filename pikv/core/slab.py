"""Near memory: taken from the system and given back to it, a slab of rows, and which of them are free."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import math
import mmap
import os
import sys
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError

_LINUX = sys.platform == "linux"
_LARGE_BYTES = 1 << 18
_MAP_NORESERVE = 0x4000  # of Linux; the mmap module names it from Python 3.13 on


def physical_memory_bytes() -> int:
    """The main memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of like's dtype and device whose memory goes back to the system with it.

    The C library keeps what it has freed for itself, up to tens of MiB a piece: a cache that shrinks would still
    weigh on the machine.
    """
    nbytes = math.prod(shape) * like.itemsize
    if not _LINUX or like.device.type != "cpu" or nbytes < _LARGE_BYTES:
        return like.new_empty(*shape)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).view(*shape)


def trim() -> None:
    """Ask the C library to give back what the process has freed; elsewhere than on Linux, nothing.

    It keeps large freed blocks to use them again, and between them what attention needed for a moment: after a long
    prompt that is more than the cache itself. Takes milliseconds, so it is for the end of a chunk and not for a token.
    """
    if _LINUX:
        trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other C libraries may not
        if trim_heap is not None:
            trim_heap(0)


class HostSlab:
    """Rows of a fixed length in main memory; address space is reserved once, memory is taken as rows are written.

    tensor: uint8 [rows, stride]. Where the system can, freed rows go back to it (`give_back`).
    """

    def __init__(self, rows: int, stride: int) -> None:
        nbytes = max(1, rows * stride)
        self._memory: mmap.mmap | None = None
        if _LINUX:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            try:
                self._memory = mmap.mmap(-1, nbytes, flags=flags)
            except OSError as error:
                raise ConfigError(
                    f"capacity_bytes: the system refused {nbytes} bytes of address space ({error}); "
                    "give the pool a smaller capacity_bytes"
                ) from error
            # A read of everything is up to a fifth faster by large memory pages, if the system has some to give.
            with contextlib.suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        else:
            flat = torch.empty(nbytes, dtype=torch.uint8)
        self.tensor: Tensor = flat[: rows * stride].view(rows, stride)

    def give_back(self, start_byte: int, stop_byte: int) -> None:
        """Return the whole memory pages of a free range to the system; what was there is lost."""
        start = -(-start_byte // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = stop_byte // mmap.PAGESIZE * mmap.PAGESIZE
        if self._memory is not None and stop > start:
            self._memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


class DeviceSlab:
    """Rows of a fixed length in a device's memory, taken whole at the start."""

    def __init__(self, rows: int, stride: int, device: torch.device) -> None:
        self.tensor: Tensor = torch.empty(rows, stride, dtype=torch.uint8, device=device)

    def give_back(self, start_byte: int, stop_byte: int) -> None:
        """Nothing: the slab keeps its memory as long as it lives."""


def reserve(rows: int, stride: int, device: torch.device) -> HostSlab | DeviceSlab:
    """Memory for rows of `stride` bytes on a device."""
    return HostSlab(rows, stride) if device.type == "cpu" else DeviceSlab(rows, stride, device)


@attrs.define
class FreeRuns:
    """The free rows of a slab as disjoint runs, sorted, never touching one another."""

    starts: list[int]
    stops: list[int]

    @classmethod
    def of(cls, rows: int) -> FreeRuns:
        """All rows free."""
        return cls([0], [rows]) if rows else cls([], [])

    @property
    def total(self) -> int:
        """The number of free rows."""
        return sum(self.stops) - sum(self.starts)

    def take(self, count: int) -> list[range]:
        """Take `count` rows: one run if any is long enough (the first such), else the first that there are."""
        for index, (start, stop) in enumerate(zip(self.starts, self.stops, strict=True)):
            if stop - start >= count:
                self._shorten(index, count)
                return [range(start, start + count)]
        taken: list[range] = []
        while count:
            size = min(count, self.stops[0] - self.starts[0])
            taken.append(range(self.starts[0], self.starts[0] + size))
            self._shorten(0, size)
            count -= size
        return taken

    def _shorten(self, index: int, count: int) -> None:
        self.starts[index] += count
        if self.starts[index] == self.stops[index]:
            del self.starts[index], self.stops[index]

    def give(self, start: int, stop: int) -> range:
        """Free the rows from start to stop; returns the whole free run that they are now part of."""
        index = bisect.bisect_left(self.starts, start)
        if index < len(self.starts) and self.starts[index] == stop:
            stop = self.stops.pop(index)
            del self.starts[index]
        if index > 0 and self.stops[index - 1] == start:
            start = self.starts.pop(index - 1)
            del self.stops[index - 1]
            index -= 1
        self.starts.insert(index, start)
        self.stops.insert(index, stop)
        return range(start, stop)
