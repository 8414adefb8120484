"""TierStack: the far tiers of a pool, in order; pages marked as they leave and compared as they come back."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Sequence
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import PageLostError, PiKVError, PoolFullError, TierError, TierFullError
from pikv.core.ports.memory_tier import MemoryTier
from pikv.core.tier_use import TierUse
from pikv.core.worker import Job, Worker

_POOLS = itertools.count()
NOWHERE = -1


@final
class TierStack:
    """Copies of pages in far tiers, by page id. The first tier that has room takes a page.

    Every page is marked by a checksum when it goes, and compared when it comes back. The tiers stay their maker's to
    close; each gets a thread here, if it has none.
    """

    def __init__(self, tiers: Sequence[MemoryTier]) -> None:
        self._tiers = list(tiers)
        self._workers = [Worker(at_most=64) for _ in tiers]
        self._first_key = next(_POOLS) << 32  # tiers may be shared by pools
        self._tier_of = torch.empty(0, dtype=torch.int8)
        self._marks = torch.empty(0, dtype=torch.int64)
        self._bytes = torch.empty(0, dtype=torch.int64)
        # By own books: a tier discards in its turn, and what is written after that finds the room.
        self._free_bytes = [tier.capacity_bytes for tier in self._tiers]
        self.use = [TierUse(name=type(tier).__name__) for tier in tiers]

    @property
    def capacity_bytes(self) -> int:
        """Of all tiers."""
        return sum(tier.capacity_bytes for tier in self._tiers)

    def grow(self, count: int) -> None:
        """Make room in the books for page ids below `count`."""
        more = count - len(self._tier_of)
        self._tier_of = torch.cat([self._tier_of, torch.full((more,), NOWHERE, dtype=torch.int8)])
        self._marks = torch.cat([self._marks, torch.zeros(more, dtype=torch.int64)])
        self._bytes = torch.cat([self._bytes, torch.zeros(more, dtype=torch.int64)])

    def holds(self, ids: Tensor) -> Tensor:
        """Which of ids int32 [n] have a copy: bool [n]."""
        return self._tier_of[ids] != NOWHERE

    def stored(self) -> Tensor:
        """Which page ids have a copy: bool [ids]."""
        return self._tier_of != NOWHERE

    def write(self, ids: Tensor, pages: Tensor) -> None:
        """Store copies of pages uint8 [n, page_bytes]. Raises PoolFullError, TierError; what was stored stays."""
        left = torch.arange(len(ids))
        problem: Exception | None = None
        for number in range(len(self._tiers)):
            fits = min(len(left), self._free_bytes[number] // pages.shape[1])
            some, rest = left[:fits], left[fits:]
            if not fits:
                continue
            try:
                self._write_to(number, ids[some], pages[some])
            except (TierError, TierFullError) as error:
                self.use[number].failures += 1
                problem, rest = error, left
            left = rest
        if len(left):
            if isinstance(problem, TierError):
                raise problem
            raise PoolFullError(
                f"pool: {len(left)} pages of {pages.shape[1]} bytes must go far and no tier has room for them; give a "
                "tier more capacity_bytes, or the layers a budget_tokens"
            )

    def _write_to(self, number: int, ids: Tensor, pages: Tensor) -> None:
        keys, pages = self._keys(ids), pages.contiguous()
        job = self._workers[number].submit(lambda: self._tiers[number].write(keys, pages).wait())
        job.wait()
        self.use[number].write_s += job.took_s
        self._marks[ids] = marks(pages)
        self._tier_of[ids], self._bytes[ids] = number, pages.shape[1]
        self._free_bytes[number] -= pages.nbytes
        self.use[number].pages_written += len(ids)
        self.use[number].bytes_written += pages.nbytes

    def read(self, ids: Tensor, slab: Tensor, rows: Tensor, *, foreseen: bool) -> list[Arrival]:
        """Ask for pages int32 [n], all of which have a copy, into rows int64 [n] of a slab uint8 [rows, page_bytes].

        foreseen: whether they are not yet needed.
        """
        arrivals, left = [], len(ids)
        for number, tier in enumerate(self._tiers):
            here = self._tier_of[ids] == number
            some = ids[here]
            left -= len(some)
            self.use[number].hits += len(some)
            self.use[number].misses += left
            if len(some):
                fetch = functools.partial(
                    _fetch, tier, self._keys(some), self._marks[some], slab, rows[here], self.use[number].name
                )
                nbytes = len(some) * slab.shape[1]
                job = self._workers[number].submit(fetch)
                arrivals.append(Arrival(job, len(some), nbytes, self.use[number], foreseen))
        return arrivals

    def forget(self, ids: Tensor) -> None:
        """Discard the copies of pages that have one."""
        for number, tier in enumerate(self._tiers):
            some = ids[self._tier_of[ids] == number]
            if len(some):
                self._workers[number].submit(functools.partial(tier.discard, self._keys(some)))
                self._free_bytes[number] += int(self._bytes[some].sum())
        self._tier_of[ids] = NOWHERE

    def uses(self) -> tuple[TierUse, ...]:
        """What has gone through each tier until now."""
        workers = zip(self.use, self._workers, strict=True)
        return tuple(attrs.evolve(use, queued=worker.depth) for use, worker in workers)

    def _keys(self, ids: Tensor) -> Tensor:
        return ids.long() + self._first_key


def _fetch(tier: MemoryTier, keys: Tensor, expected: Tensor, slab: Tensor, rows: Tensor, name: str) -> None:
    """Read pages in one batch, compare them, and put them into their rows: by the tier's thread."""
    pages = torch.empty(len(keys), slab.shape[1], dtype=torch.uint8)
    tier.read(keys, pages).wait()
    wrong = torch.nonzero(marks(pages) != expected).flatten().tolist()
    if wrong:
        raise PageLostError(
            f"pool: {len(wrong)} of {len(keys)} pages came back from {name} changed; check the device, and restore or "
            "compute again"
        )
    slab[rows.to(slab.device)] = pages.to(slab.device)


@attrs.frozen(eq=False)
class Arrival:
    """Pages of one tier that are being read."""

    ticket: Job
    pages: int
    nbytes: int
    use: TierUse
    foreseen: bool

    def wait(self) -> None:
        """Return when the pages are there and are what was written. Raises PageLostError, TierError."""
        started = time.perf_counter()
        try:
            self.ticket.wait()
        except (TierError, PageLostError):
            self.use.failures += 1
            raise
        finally:
            self.use.waited(self.ticket.took_s, time.perf_counter() - started, foreseen=self.foreseen)
        self.use.pages_read += self.pages
        self.use.bytes_read += self.nbytes

    def settle(self) -> None:
        """Return when nothing more is written to the slab, whatever has come of it."""
        with contextlib.suppress(PiKVError):
            self.ticket.wait()


def marks(pages: Tensor) -> Tensor:
    """A checksum of each of pages uint8 [n, page_bytes], which are whole words: int64 [n].

    The sum of a page's 64-bit words, each times an odd number, modulo 2^64: no change of one word goes unnoticed, and
    others by a chance of 2^-63. Much quicker than a checksum for storage, at the cost of what that says of its errors.
    """
    words = pages.view(torch.int64)
    return words @ _weights(words.shape[1])


@functools.lru_cache(maxsize=64)
def _weights(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1
