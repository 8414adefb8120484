"""Time contestants side by side in one process, on memory that no processor cache holds.

Contestants take turns, so that what disturbs the machine disturbs all. A turn is a burst of calls on different copies
of what is read (layers of a cache, say), the first calls of which are not timed: threads of another library may still
be spinning. Before each burst other memory is read, more than the processor's caches hold; where there are not copies
enough for a burst, before each call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import attrs
import numba
import numpy as np
import torch
from tqdm import tqdm

COLD_BYTES = 1 << 30  # more than a processor's caches hold
WARM_CALLS, TIMED_CALLS = 2, 4
CALLS = WARM_CALLS + TIMED_CALLS
BURST_S = 0.5  # a slow contestant gets fewer calls in a burst, one at least
_BLOCK = 1 << 13  # words of 8 bytes: 64 KiB at a time for a thread


@attrs.frozen(kw_only=True)
class Contestant:
    """One way to do the work. `run(copy)` does it once, on one of `copies`, and reads `nbytes`."""

    name: str
    run: Callable[[int], object]
    copies: int
    nbytes: int


@attrs.frozen(kw_only=True)
class Time:
    """Medians in milliseconds: of a contestant's call, and of a plain read of as many bytes beside it."""

    ms: float
    read_ms: float

    @property
    def fraction(self) -> float:
        """How near the contestant comes to reading at full speed."""
        return self.read_ms / self.ms


def copies_for(nbytes: int) -> int:
    """How many copies of so many bytes a burst must read for none to be in a cache."""
    return max(1, min(CALLS, -(-COLD_BYTES // nbytes)))


def set_threads(threads: int) -> None:
    """The same number of threads for torch, for Numba's kernels, and so for the plain read."""
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)


class PlainRead:
    """The roof: a compiled loop that reads memory in order, on all threads, and does nothing with it."""

    def __init__(self) -> None:
        self._words = np.ones(COLD_BYTES // 8, dtype=np.int64)
        self._next = 0

    def read(self, nbytes: int) -> None:
        """Read so many bytes that were not read lately."""
        words = -(-nbytes // 8 // _BLOCK) * _BLOCK
        while words:
            if self._next + min(words, _BLOCK) > len(self._words):
                self._next = 0
            part = self._words[self._next : self._next + words]
            _read(part)
            self._next += len(part)
            words -= len(part)

    def flush(self) -> None:
        """Put other bytes into the processor's caches."""
        _read(self._words)


@numba.njit(parallel=True, nogil=True)
def _read(words):  # type: ignore[no-untyped-def]  # Numba infers them
    total = 0
    for block in numba.prange(len(words) // _BLOCK):
        seen = np.int64(0)
        for i in range(block * _BLOCK, (block + 1) * _BLOCK):
            seen |= words[i]
        total += seen
    return total


def interleaved(contestants: Iterable[Contestant], plain: PlainRead, rounds: int, progress: tqdm) -> dict[str, Time]:
    """Let all take turns for some rounds; `progress` moves by one a burst."""
    contestants = list(contestants)
    times: dict[str, tuple[list[float], list[float]]] = {contestant.name: ([], []) for contestant in contestants}
    for turn in range(rounds):
        for contestant in contestants:
            progress.set_postfix_str(contestant.name)
            own, reads = times[contestant.name]
            own += _burst(contestant, plain, first=turn * CALLS)
            reads += _burst(_reading(contestant.nbytes, plain), plain, first=0)
            progress.update()
    return {
        name: Time(ms=1e3 * statistics.median(own), read_ms=1e3 * statistics.median(reads))
        for name, (own, reads) in times.items()
    }


def _reading(nbytes: int, plain: PlainRead) -> Contestant:
    return Contestant(name="plain read", run=lambda _: plain.read(nbytes), copies=CALLS, nbytes=nbytes)


def _burst(contestant: Contestant, plain: PlainRead, first: int) -> list[float]:
    """Seconds of the timed calls of one burst, which goes round the copies from the first on."""
    seconds: list[float] = []
    enough = contestant.copies >= copies_for(contestant.nbytes)
    while len(seconds) < CALLS and sum(seconds) < BURST_S:
        if not (seconds and enough):
            plain.flush()
        start = time.perf_counter()
        contestant.run((first + len(seconds)) % contestant.copies)
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_CALLS:] or seconds[-1:]
