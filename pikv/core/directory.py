"""Which pages of a tier lie in which rows of its slabs, and what room is left: the books of tiers made of rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from pikv.core.errors import InputError, PageLostError, StateError, TierFullError
from pikv.core.slab import FreeRuns


@attrs.define
class Directory:
    """Keys and rows. There is a slab for each length of page; the pages of all together take capacity_bytes at most."""

    capacity_bytes: int
    used_bytes: int = attrs.field(default=0, init=False)
    _free: dict[int, FreeRuns] = attrs.field(factory=dict, init=False)
    _places: dict[int, tuple[int, int]] = attrs.field(factory=dict, init=False)
    """Of each key the length of its page, and its row."""

    def rows_of(self, page_bytes: int) -> int:
        """How many rows the slab of pages of this length has."""
        return self.capacity_bytes // page_bytes

    def add(self, keys: Tensor, page_bytes: int) -> Tensor:
        """Give each key a row, side by side if there is such a run: int64 [n].

        Raises InputError for a key that has one, TierFullError.
        """
        held = [key for key in keys.tolist() if key in self._places]
        if held:
            raise InputError(f"keys must be new, since pages never change, got {held[:8]} that are held already")
        free = self._free.setdefault(page_bytes, FreeRuns.of(self.rows_of(page_bytes)))
        room = min(free.total, (self.capacity_bytes - self.used_bytes) // page_bytes)
        if len(keys) > room:
            raise TierFullError(
                f"tier: {len(keys)} pages of {page_bytes} bytes are to be written and {room} fit into what is left of "
                f"capacity_bytes={self.capacity_bytes}; discard some, or raise it"
            )
        rows = [row for run in free.take(len(keys)) for row in run]
        self._places.update((key, (page_bytes, row)) for key, row in zip(keys.tolist(), rows, strict=True))
        self.used_bytes += len(keys) * page_bytes
        return torch.tensor(rows, dtype=torch.int64)

    def find(self, keys: Tensor, page_bytes: int) -> Tensor:
        """The rows of keys int64 [n], whose pages have this length: int64 [n]. Raises PageLostError."""
        places = [self._places.get(key) for key in keys.tolist()]
        lost = [
            key for key, place in zip(keys.tolist(), places, strict=True) if place is None or place[0] != page_bytes
        ]
        if lost:
            raise PageLostError(f"tier: it holds no page of {page_bytes} bytes with key {lost[0]} ({len(lost)} such)")
        return torch.tensor([place[1] for place in places if place is not None], dtype=torch.int64)

    def drop(self, keys: Tensor) -> list[tuple[int, range]]:
        """Take the rows of the keys that are held back: (page_bytes, the whole free run that a row is now part of)."""
        freed = []
        for key in keys.tolist():
            if key in self._places:
                page_bytes, row = self._places.pop(key)
                self.used_bytes -= page_bytes
                freed.append((page_bytes, self._free[page_bytes].give(row, row + 1)))
        return freed

    def contains(self, keys: Tensor) -> Tensor:
        """Which of keys int64 [n] have a row: bool [n]."""
        return torch.tensor([key in self._places for key in keys.tolist()], dtype=torch.bool)

    def check_integrity(self) -> None:
        """Raise StateError unless every row is either free or one key's, and the bytes add up."""
        rows: dict[int, list[int]] = {}
        for page_bytes, row in self._places.values():
            rows.setdefault(page_bytes, []).append(row)
        used = sum(page_bytes * len(taken) for page_bytes, taken in rows.items())
        whole = all(
            len(set(rows.get(page_bytes, []))) + free.total == self.rows_of(page_bytes)
            for page_bytes, free in self._free.items()
        )
        if used != self.used_bytes or not whole:
            raise StateError(
                f"tier: its books say {self.used_bytes} bytes, its rows {used}, or a row is taken twice; this is a "
                "defect of PiKV, please report it"
            )


def runs(rows: Tensor) -> Iterator[tuple[int, int, int]]:
    """Where rows int64 [n] follow one another: (first index, first row, count) of each run, in order."""
    breaks = [0, *(torch.nonzero(rows.diff() != 1).flatten() + 1).tolist(), len(rows)]
    for first, stop in itertools.pairwise(breaks):
        if stop > first:
            yield first, int(rows[first]), stop - first
