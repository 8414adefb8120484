"""The facts that every FullPool must hold to, as tests to inherit.

class TestMine(FullPoolConformance):
    def make(self) -> FullPool:
        return Mine()
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pikv.core.ports import FullPool
from pikv.testing.policy import PolicyConformance, assert_equal, inherited
from pikv.testing.requests import sealed_pages


class FullPoolConformance(PolicyConformance):
    """Inherit, and say what `make` makes."""

    def make(self) -> FullPool:
        """Make the full pool to test, with the same settings every time."""
        raise NotImplementedError("make: return the full pool to test")

    @inherited
    @given(newest=sealed_pages(), needed=st.integers(1, 20))
    def test_enough_pages_leave_or_none(self, newest: Tensor, needed: int) -> None:
        """At least as many pages leave as are needed, all of which exist; else the answer is None."""
        leaving = self.make().leaving(newest, needed)
        if leaving is None:
            return
        assert leaving.dtype == torch.bool, f"got {leaving.dtype}, expected bool"
        assert leaving.shape == newest.shape, f"got {list(leaving.shape)}, expected {list(newest.shape)}"
        assert int(leaving.sum()) >= needed, f"{int(leaving.sum())} pages leave, {needed} are needed"
        assert bool((newest[leaving] >= 0).all()), f"{leaving.tolist()} leave, which are not all pages"

    @inherited
    @given(newest=sealed_pages(), needed=st.integers(1, 20))
    def test_it_changes_nothing(self, newest: Tensor, needed: int) -> None:
        """The table's numbers stay as they are."""
        before = newest.clone()
        self.make().leaving(newest, needed)
        assert_equal(newest, before, "newest after")
