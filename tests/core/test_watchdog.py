"""A call that does not return is noticed."""

from __future__ import annotations

import threading
import time

import pytest

import pikv
from pikv.core.watchdog import Watchdog


def test_a_call_that_takes_too_long_is_named_once() -> None:
    """With what was being done, and for how long."""
    said, rang = [], threading.Event()

    def expired(message: str) -> None:
        said.append(message)
        rang.set()

    with Watchdog(deadline_s=0.05, expired=expired) as dog, dog.watching("a barrier"):
        assert rang.wait(20)
        time.sleep(0.2)
    assert len(said) == 1
    assert said[0].startswith("a barrier is not done after 0.")


def test_short_calls_are_let_be() -> None:
    """However many, and however long the time between them."""
    said: list[str] = []
    with Watchdog(deadline_s=5.0, expired=said.append) as dog:
        for _ in range(100):
            with dog.watching("a barrier"):
                pass
        dog.close()
    assert not said


def test_the_watchdog_may_be_closed_by_what_it_calls() -> None:
    """It does not wait for itself."""
    rang = threading.Event()
    dog: Watchdog

    def expired(_: str) -> None:
        dog.close()
        rang.set()

    dog = Watchdog(deadline_s=0.05, expired=expired)
    with dog.watching("a barrier"):
        assert rang.wait(20)


def test_a_deadline_is_positive() -> None:
    """ConfigError."""
    with pytest.raises(pikv.ConfigError, match="deadline_s must be positive, got 0"):
        Watchdog(deadline_s=0, expired=lambda _: None)
