"""Overlap: work that runs while ranks exchange tensors, and how much of both was hidden."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, final

import attrs
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports.transport import Transport
from pikv.core.timeline import Timeline
from pikv.core.worker import Worker

Result = TypeVar("Result")

PREFETCH, STREAM = "prefetch", "stream"
"""Kinds of work: to fetch the pages that the next layer reads, to write sealed pages to a store."""

_COLLECTIVES = ("broadcast", "all_gather", "all_reduce", "all_to_all", "barrier")


@attrs.frozen
class Schedule:
    """Which kinds of work may run during which collective, by names; by default both kinds during those of a layer."""

    during: Mapping[str, frozenset[str]] = attrs.field(
        factory=lambda: dict.fromkeys(("all_gather", "all_to_all"), frozenset({PREFETCH, STREAM}))
    )

    def __attrs_post_init__(self) -> None:
        if unknown := set(self.during) - set(_COLLECTIVES):
            raise ConfigError(f"a schedule is for {', '.join(_COLLECTIVES)}, got {sorted(unknown)}; name collectives")

    def permits(self, collective: str, kind: str) -> bool:
        """Whether such work may run during such a collective."""
        return kind in self.during.get(collective, ())


@attrs.define(kw_only=True)
class CollectiveUse:
    """What one kind of collective took. seconds: of the collectives; exposed_s: that the caller waited for them.

    typical_s: a moving average of one; None before any. threaded: how many had work beside them.
    """

    calls: int = 0
    threaded: int = 0
    seconds: float = 0.0
    exposed_s: float = 0.0
    typical_s: float | None = None

    def note(self, took_s: float, *, exposed_s: float, threaded: bool) -> None:
        """One more."""
        self.calls += 1
        self.threaded += threaded
        self.seconds += took_s
        self.exposed_s += exposed_s
        before = took_s if self.typical_s is None else self.typical_s
        self.typical_s = 0.8 * before + 0.2 * took_s


@final
class Overlap(Transport):
    """A transport that does offered work while a collective is in flight on a thread of its own.

    Source: PRESERVE, arXiv 2501.08192: what can be saved is the lesser of the two times. Work runs on the thread that
    calls the collective. shortest_s: a collective that typically takes less gains nothing by a thread, so work offered
    for such ones runs at once instead: overlap turns itself off, and on again, by what it measures. timeline: notes
    when each collective and each piece of work ran. Closes the transport that it was given.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        schedule: Schedule | None = None,
        shortest_s: float = 4e-4,
        timeline: Timeline | None = None,
    ) -> None:
        if shortest_s < 0:
            raise ConfigError(f"shortest_s must not be negative, got {shortest_s}; 0 overlaps every collective")
        self.transport, self.shortest_s = transport, shortest_s
        self.schedule = Schedule() if schedule is None else schedule
        self.timeline = Timeline() if timeline is None else timeline
        self.use = {name: CollectiveUse() for name in _COLLECTIVES}
        self.work_s: dict[str, float] = {}
        self._offered: dict[str, Callable[[], None]] = {}
        self._worker = Worker(at_most=1)

    @property
    def rank(self) -> int:
        """The rank below."""
        return self.transport.rank

    @property
    def size(self) -> int:
        """The size below."""
        return self.transport.size

    def offer(self, kind: str, work: Callable[[], None]) -> None:
        """Let this be done during the next collective that the schedule has for such work, or now if all are too short.

        It takes the place of work of this kind that was offered before and not begun, and calls no collective.
        """
        if any(self._pays(name) for name in _COLLECTIVES if self.schedule.permits(name, kind)):
            self._offered[kind] = work
        else:
            self._work(kind, work)

    def finish(self, kind: str) -> None:
        """Do now what was offered of this kind and has not begun."""
        if kind in self._offered:
            self._work(kind, self._offered.pop(kind))

    def broadcast(self, tensor: Tensor, *, root: int) -> Tensor:
        """As below."""
        return self._during("broadcast", lambda: self.transport.broadcast(tensor, root=root))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """As below."""
        return self._during("all_gather", lambda: self.transport.all_gather(tensor))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """As below."""
        return self._during("all_reduce", lambda: self.transport.all_reduce(tensor))

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """As below."""
        return self._during("all_to_all", lambda: self.transport.all_to_all(parts))

    def barrier(self) -> None:
        """As below."""
        self._during("barrier", self.transport.barrier)

    def close(self) -> None:
        """End the thread, then close the transport below."""
        self._worker.close()
        self.transport.close()

    def report(self) -> str:
        """A line for each kind of collective that there was, and one for each kind of work."""
        lines = []
        for name, use in self.use.items():
            if use.calls:
                hidden = use.seconds - use.exposed_s
                off = "" if self._pays(name) else f"; off: shorter than {self.shortest_s * 1e3:.1f} ms"
                lines.append(
                    f"{name}: {use.calls} in {use.seconds:.3f} s, {use.exposed_s:.3f} s exposed, {hidden:.3f} s beside "
                    f"work of {use.threaded}{off}"
                )
        lines += [f"{kind}: {seconds:.3f} s of this thread" for kind, seconds in self.work_s.items()]
        return "\n".join(lines)

    def _pays(self, name: str) -> bool:
        typical_s = self.use[name].typical_s
        return typical_s is not None and typical_s >= self.shortest_s

    def _during(self, name: str, collective: Callable[[], Result]) -> Result:
        due = [kind for kind in self._offered if self.schedule.permits(name, kind) and self._pays(name)]

        def noted() -> Result:
            with self.timeline.span(name, "collectives"):
                return collective()

        started = time.perf_counter()
        if not due:
            result = noted()
            took_s = time.perf_counter() - started
            self.use[name].note(took_s, exposed_s=took_s, threaded=False)
            return result
        job = self._worker.submit(noted)
        try:
            for kind in due:
                self._work(kind, self._offered.pop(kind))
        finally:
            waited = time.perf_counter()
            received: Result = job.result()
            self.use[name].note(job.took_s, exposed_s=time.perf_counter() - waited, threaded=True)
        return received

    def _work(self, kind: str, work: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            with self.timeline.span(kind, "work"):
                work()
        finally:
            self.work_s[kind] = self.work_s.get(kind, 0.0) + time.perf_counter() - started
