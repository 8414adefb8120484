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

from pikv.adapters.numba_cpu.shape import FLOAT
from pikv.adapters.numba_cpu.simd import add, total
from pikv.adapters.numba_cpu.tiles import Tile, load_row, zeros

COLD_BYTES = 1 << 30  # more than a processor's caches hold
WARM_CALLS, TIMED_CALLS = 2, 4
CALLS = WARM_CALLS + TIMED_CALLS
BURST_S = 0.5  # a slow contestant gets fewer calls in a burst, one at least
_BLOCK = 1 << 16  # bytes at a time for a thread
_STRIP = Tile(lanes=16, rows=1, columns=4)  # 256 bytes in vectors: single words would keep too few reads in flight


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
    """The roof: a compiled loop that reads memory in order by vectors, on all threads, and does nothing with it."""

    def __init__(self) -> None:
        self._memory = np.ones(COLD_BYTES, dtype=np.uint8)
        self._next = 0

    def read(self, nbytes: int) -> None:
        """Read so many bytes that were not read lately."""
        blocks = -(-nbytes // _BLOCK)
        while blocks:
            count = min(blocks, COLD_BYTES // _BLOCK - self._next)
            _read(_STRIP, self._memory.ctypes.data + self._next * _BLOCK, count)
            self._next = (self._next + count) % (COLD_BYTES // _BLOCK)
            blocks -= count

    def flush(self) -> None:
        """Put other bytes into the processor's caches."""
        _read(_STRIP, self._memory.ctypes.data, COLD_BYTES // _BLOCK)


@numba.njit(parallel=True, nogil=True)
def _read(strip, address, blocks):  # type: ignore[no-untyped-def]  # Numba infers them
    seen = np.float32(0)
    for block in numba.prange(blocks):
        sums = zeros(strip)
        for at in range(address + block * _BLOCK, address + (block + 1) * _BLOCK, 4 * strip.width):
            sums = add(sums, load_row(strip, FLOAT, at))
        for vector in sums:
            seen += total(vector)
    return seen


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
