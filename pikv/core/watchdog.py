"""Watchdog: notices a call that does not return."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import final

from pikv.core.errors import ConfigError
from pikv.core.ports.owner import Owner

_LOOKS = 10  # within a deadline, so that it is kept to a tenth


@final
class Watchdog(Owner):
    """A thread that looks whether a call has taken longer than deadline_s, and then says so to `expired`, once.

    For calls that cannot be left, such as a collective whose other ranks are gone. expired is called on the watchdog's
    thread, with what was being done and for how long. To watch costs next to nothing: the caller notes when it began.
    """

    def __init__(self, *, deadline_s: float, expired: Callable[[str], None]) -> None:
        if deadline_s <= 0:
            raise ConfigError(f"deadline_s must be positive, got {deadline_s}; None waits for ever")
        self.deadline_s = deadline_s
        self._doing: tuple[str, float] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(expired,), daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """While this is open, `what` is being done."""
        self._doing = what, time.monotonic()
        try:
            yield
        finally:
            self._doing = None

    def close(self) -> None:
        """Look no more. A second call does nothing."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _look(self, expired: Callable[[str], None]) -> None:
        while not self._closed.wait(self.deadline_s / _LOOKS):
            doing = self._doing
            if doing is not None and time.monotonic() - doing[1] > self.deadline_s:
                expired(f"{doing[0]} is not done after {time.monotonic() - doing[1]:.1f} s")
                return
