"""What the suites of all policies share: settings are values, and tests are inherited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

Test = TypeVar("Test", bound=Callable[..., None])


def inherited(test: Test) -> Test:
    """Let a hypothesis test run in every class that inherits it, and not be judged by the clock."""
    return settings(deadline=None, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow])(test)


def assert_equal(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError unless both are the same, bit by bit but for NaN, which is equal to itself."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    same = got.shape == expected.shape and bool(((got == expected) | ((got != got) & (expected != expected))).all())
    assert same, f"{what}: {got.tolist()}, expected {expected.tolist()}"


def assert_close(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError unless both are the same but for rounding."""
    torch.testing.assert_close(got, expected, equal_nan=True, msg=lambda message: f"{what}: {message}")


class PolicyConformance:
    """A policy is frozen settings: it holds no state and compares by value."""

    def make(self) -> Any:
        """Make the policy to test, with the same settings every time."""
        raise NotImplementedError("make: return the policy to test")

    def test_equal_settings_are_equal_and_hash_alike(self) -> None:
        """Caches are joined if they are composed alike, so a policy is a value: equal when made alike."""
        assert self.make() == self.make(), "make() twice gave unequal policies; use attrs.frozen"
        assert hash(self.make()) == hash(self.make())
