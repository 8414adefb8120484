"""MpiPeerTier: the memory of another rank, which need not take part when pages go and come."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import final

import torch
from mpi4py import MPI
from torch import Tensor

from pikv.core.errors import ConfigError, InputError, PageLostError, StateError, TierError, TierFullError
from pikv.core.ports.memory_tier import Done, MemoryTier, Ticket, check_batch
from pikv.core.slab import FreeRuns

UNIT_BYTES = 64  # what pages are whole numbers of, as their strides are


@final
class MpiPeerTier(MemoryTier):
    """Pages in memory that another rank lends: written and read one-sided, by MPI_Put and MPI_Get.

    Every rank of the communicator makes one at the same time, with the same capacity_bytes, lends that much of its
    memory and uses what `peer` lends, by default the next rank; no two ranks may use the same peer. The window is
    locked once, so that a busy peer is not waited for. Constructor and `close` are collective. What a peer holds is
    gone when it ends.
    """

    def __init__(
        self, communicator: MPI.Intracomm = MPI.COMM_WORLD, *, capacity_bytes: int, peer: int | None = None
    ) -> None:
        rank, size = communicator.Get_rank(), communicator.Get_size()
        self.capacity_bytes, self.peer = capacity_bytes, (rank + 1) % size if peer is None else peer
        peers = communicator.allgather(self.peer)
        if sorted(peers) != list(range(size)):
            raise ConfigError(f"peer must be another rank for each rank, all of 0 to {size - 1}, got {peers}")
        self._communicator = communicator.Dup()
        self._window: MPI.Win | None = MPI.Win.Allocate(max(1, capacity_bytes), 1, comm=self._communicator)
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self._free = FreeRuns.of(capacity_bytes // UNIT_BYTES)
        self._runs: dict[int, tuple[int, list[range]]] = {}
        """Of each key the length of its page, and its units."""

    @property
    def used_bytes(self) -> int:
        """The bytes of all pages held, in whole units."""
        return self.capacity_bytes // UNIT_BYTES * UNIT_BYTES - self._free.total * UNIT_BYTES

    def write(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Put the pages into the peer's memory; returns when they are there."""
        check_batch(keys, pages)
        window, page_bytes = self._open(), pages.shape[1]
        units = -(-page_bytes // UNIT_BYTES)
        held = [key for key in keys.tolist() if key in self._runs]
        if held:
            raise InputError(f"keys must be new, since pages never change, got {held[:8]} that are held already")
        if len(keys) * units > self._free.total:
            raise TierFullError(
                f"tier: {len(keys)} pages of {page_bytes} bytes are to be written and {self._free.total * UNIT_BYTES} "
                f"bytes are left of capacity_bytes={self.capacity_bytes}; discard some, or raise it"
            )
        runs = _split(self._free.take(len(keys) * units), units)
        self._runs |= {key: (page_bytes, own) for key, own in zip(keys.tolist(), runs, strict=True)}
        with _errors("write", self.peer):
            for page, (unit, first, last) in _pieces(runs, page_bytes):
                window.Put([pages[page, first:last], MPI.BYTE], self.peer, unit * UNIT_BYTES)
            window.Flush(self.peer)
        return Done()

    def read(self, keys: Tensor, out: Tensor) -> Ticket:
        """Get the pages from the peer's memory."""
        check_batch(keys, out)
        window, page_bytes = self._open(), out.shape[1]
        found = [self._runs.get(key) for key in keys.tolist()]
        runs = [place[1] for place in found if place is not None and place[0] == page_bytes]
        if len(runs) < len(keys):
            lost = next(k for k, at in zip(keys.tolist(), found, strict=True) if at is None or at[0] != page_bytes)
            raise PageLostError(f"tier: it holds no page of {page_bytes} bytes with key {lost}")
        with _errors("read", self.peer):
            for page, (unit, first, last) in _pieces(runs, page_bytes):
                window.Get([out[page, first:last], MPI.BYTE], self.peer, unit * UNIT_BYTES)
            window.Flush(self.peer)
        return Done()

    def discard(self, keys: Tensor) -> None:
        """Free their units."""
        self._open()
        for key in keys.tolist():
            for run in self._runs.pop(key, (0, []))[1]:
                self._free.give(run.start, run.stop)

    def contains(self, keys: Tensor) -> Tensor:
        """Which keys have units."""
        self._open()
        return torch.tensor([key in self._runs for key in keys.tolist()], dtype=torch.bool)

    def check_integrity(self) -> None:
        """Raise StateError unless every unit is free or one page's."""
        self._open()
        free = [range(*run) for run in zip(self._free.starts, self._free.stops, strict=True)]
        taken = sorted([*free, *itertools.chain(*(runs for _, runs in self._runs.values()))], key=lambda run: run.start)
        stops = [0, *(run.stop for run in taken)]
        if [run.start for run in taken] != stops[:-1] or stops[-1] != self.capacity_bytes // UNIT_BYTES:
            raise StateError(f"tier: units are missing or taken twice among {len(self._runs)} pages; this is a defect")

    def close(self) -> None:
        """Take the lent memory back, together with all ranks."""
        if self._window is not None:
            window, self._window = self._window, None
            window.Unlock_all()
            window.Free()
            self._communicator.Free()

    def _open(self) -> MPI.Win:
        if self._window is None:
            raise StateError("MpiPeerTier: it is closed; make another")
        return self._window


@contextlib.contextmanager
def _errors(operation: str, peer: int) -> Iterator[None]:
    """Turn what MPI raises into TierError."""
    try:
        yield
    except MPI.Exception as error:
        raise TierError(
            f"tier: {operation} with the memory of rank {peer} failed: {error.Get_error_string()}; has it ended?"
        ) from error


def _split(runs: list[range], units: int) -> list[list[range]]:
    """Runs of units as pages of so many each."""
    pages: list[list[range]] = []
    page, missing = [], units
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + missing)
            page.append(range(start, stop))
            missing -= stop - start
            start = stop
            if not missing:
                pages.append(page)
                page, missing = [], units
    return pages


def _pieces(runs: list[list[range]], page_bytes: int) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """For each run of each page its number, and the first unit, the first byte and the last byte of the page."""
    for page, own in enumerate(runs):
        first = 0
        for run in own:
            last = min(page_bytes, first + len(run) * UNIT_BYTES)
            yield page, (run.start, first, last)
            first = last
