"""One thread that does work on pages in order, and Background, which gives a synchronous tier that thread."""

from __future__ import annotations

import atexit
import enum
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from pikv.core.errors import ConfigError, StateError, WaitTimeoutError
from pikv.core.ports.memory_tier import MemoryTier, Ticket, check_batch


class _State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"


@final
class Job(Ticket):
    """A call that the worker makes. took_s: how long it took, once it is done."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work: Callable[[], Any] | None = work
        self._state = _State.WAITING
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None
        self.took_s = 0.0

    def done(self) -> bool:
        """Whether the call has returned, raised or was cancelled."""
        return self._over.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the call has returned."""
        self.result(timeout_s)

    def result(self, timeout_s: float | None = None) -> Any:
        """What the call returned."""
        if not self._over.wait(timeout_s):
            raise WaitTimeoutError(f"ticket: not done after {timeout_s} s; wait again, or look at the tier's device")
        if self._state is _State.CANCELLED:
            raise StateError("ticket: it was cancelled, so nothing of it has happened; ask again if it is needed")
        if self._error is not None:
            raise self._error
        return self._result

    def cancel(self) -> bool:
        """Take the call back if the worker has not begun it."""
        with self._lock:
            if self._state is not _State.WAITING:
                return self._state is _State.CANCELLED
            self._state = _State.CANCELLED
        self._end()
        return True

    def run(self) -> None:
        """Make the call, unless it was cancelled."""
        with self._lock:
            if self._state is not _State.WAITING or self._work is None:
                return
            self._state = _State.RUNNING
        started = time.perf_counter()
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self.took_s = time.perf_counter() - started
        self._state = _State.FINISHED
        self._end()

    def _end(self) -> None:
        self._work = None  # and with it the memory that it was given
        self._over.set()


@final
class Worker:
    """A thread that makes calls in the order in which they were submitted, and ends with its owner.

    at_most: how many calls wait; `submit` waits until there is room, so that a backlog is bounded.
    """

    def __init__(self, *, at_most: int) -> None:
        if at_most < 1:
            raise ConfigError(f"at_most must be at least 1, got {at_most}; it is how many calls may wait")
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(at_most)
        self._closed = False
        # The thread knows the queue alone: a worker that nobody holds any more is collected, and its thread ends.
        self._thread = threading.Thread(target=_work, args=(self._jobs, self._room), daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, self._jobs.put, None)
        self._stop.atexit = False
        _OPEN.add(self)

    def submit(self, work: Callable[[], Any]) -> Job:
        """Let the thread call `work`. Raises StateError after `close`."""
        if self._closed:
            raise StateError("worker: it is closed and takes no more work; make another")
        self._room.acquire()
        job = Job(work)
        self._jobs.put(job)
        return job

    @property
    def depth(self) -> int:
        """How many calls wait; the one that is being made is not among them."""
        return self._jobs.qsize()

    def close(self) -> None:
        """Return when all that was submitted is done. A second call does nothing."""
        self._closed = True
        self._stop()
        self._thread.join()


_OPEN: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """An interpreter that ends in the middle of a call would take the process down."""
    for worker in list(_OPEN):
        worker.close()


def _work(jobs: queue.SimpleQueue[Job | None], room: threading.Semaphore) -> None:
    while (job := jobs.get()) is not None:
        room.release()
        job.run()
        del job  # what it holds is not held while the thread waits for the next


@final
class Background(MemoryTier):
    """A tier whose reads and writes are done by a thread of its own, in order, while its caller goes on.

    at_most: how many operations wait; another one then waits in its call. Closes the tier that it was given.
    """

    def __init__(self, tier: MemoryTier, *, at_most: int = 64) -> None:
        self.capacity_bytes = tier.capacity_bytes
        self.tier = tier
        self._worker = Worker(at_most=at_most)

    @property
    def used_bytes(self) -> int:
        """The bytes that the tier uses, of what has been done so far."""
        return self.tier.used_bytes

    @property
    def depth(self) -> int:
        """How many operations wait."""
        return self._worker.depth

    def write(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Ask for the pages to be written; they must stay as they are until the ticket is done."""
        check_batch(keys, pages)
        return self._worker.submit(lambda: self.tier.write(keys, pages).wait())

    def read(self, keys: Tensor, out: Tensor) -> Ticket:
        """Ask for the pages to be read; out is complete when the ticket is done."""
        check_batch(keys, out)
        return self._worker.submit(lambda: self.tier.read(keys, out).wait())

    def discard(self, keys: Tensor) -> None:
        """Ask for the pages to be forgotten."""
        self._worker.submit(lambda: self.tier.discard(keys))

    def contains(self, keys: Tensor) -> Tensor:
        """Which keys are held once all that was asked before is done."""
        held: Tensor = self._worker.submit(lambda: self.tier.contains(keys)).result()
        return held

    def check_integrity(self) -> None:
        """Check the tier, once all that was asked before is done."""
        self._worker.submit(self.tier.check_integrity).wait()

    def close(self) -> None:
        """Finish what was asked for, then close the tier."""
        self._worker.close()
        self.tier.close()
