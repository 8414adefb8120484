"""ModelledTier: the time that a device would take, on top of a tier that is there."""

from __future__ import annotations

import time
from typing import final

from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.over_tier import OverTier
from pikv.core.ports.memory_tier import Done, MemoryTier, Ticket


@final
class ModelledTier(OverTier):
    """A model of a slower device: a batch takes latency_s and its bytes / bytes_per_s, by the clock. Not a device.

    The batch is written to or read from `tier` meanwhile, so a model can only be slower than what it stands on:
    operations that took longer than the model says are counted in `late`, and the seconds by which in `late_s`.
    shortest_s: the shortest time that this machine's clock can keep, measured when the model is made; a shorter
    latency_s is refused. One batch at a time: what overlaps on a device that takes several at once is slower here.
    Forgetting pages and looking for them take no time of the model.
    """

    def __init__(self, tier: MemoryTier, *, latency_s: float, bytes_per_s: float) -> None:
        super().__init__(tier)
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.shortest_s = shortest_s()
        if bytes_per_s <= 0 or latency_s < self.shortest_s:
            raise ConfigError(
                f"latency_s must be at least {self.shortest_s:.1e} s, the shortest time that can be kept here, and "
                f"bytes_per_s positive, got {latency_s} and {bytes_per_s}; compute a shorter time instead of modelling "
                "it"
            )
        self.late, self.late_s, self.modelled_s = 0, 0.0, 0.0

    def write(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Write to the tier below, and return when the model's time is over."""
        started = time.perf_counter()
        self.tier.write(keys, pages).wait()
        return self._took(started, pages.nbytes)

    def read(self, keys: Tensor, out: Tensor) -> Ticket:
        """Read from the tier below, and return when the model's time is over."""
        started = time.perf_counter()
        self.tier.read(keys, out).wait()
        return self._took(started, out.nbytes)

    def _took(self, started: float, nbytes: int) -> Ticket:
        span = self.latency_s + nbytes / self.bytes_per_s
        late = time.perf_counter() - started - span
        if late > 0:
            self.late, self.late_s = self.late + 1, self.late_s + late
        self.modelled_s += span
        sleep_until(started + span)
        return Done()


def sleep_until(moment: float) -> None:
    """Return at this moment of `time.perf_counter`, other threads running meanwhile."""
    while (left := moment - time.perf_counter()) > 0:
        # What remains is waited for by sleeps of no length, which let others run and come back soon.
        time.sleep(left - _COARSE_S if left > 2 * _COARSE_S else 0)


_COARSE_S = 2e-4  # a sleep may be longer by about this


def shortest_s() -> float:
    """The median of what a sleep of no length takes by `sleep_until`, twice: shorter times are not kept."""
    spans = []
    for _ in range(21):
        started = time.perf_counter()
        sleep_until(started + 1e-9)
        spans.append(time.perf_counter() - started)
    return 2 * sorted(spans)[len(spans) // 2]
