"""The facts that every Placement must hold to, as tests to inherit.

class TestMine(PlacementConformance):
    def make(self) -> Placement:
        return Mine()
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv.core.errors import ConfigError
from pikv.core.ports import Placement
from pikv.testing.policy import PolicyConformance, assert_equal, inherited


class PlacementConformance(PolicyConformance):
    """Inherit, and say what `make` makes: for 8 experts on 4 places."""

    def make(self) -> Placement:
        """Make the placement to test, with the same settings every time."""
        raise NotImplementedError("make: return the placement to test")

    @inherited
    @given(load=st.lists(st.integers(0, 1000), min_size=8, max_size=8))
    def test_every_expert_has_a_slot(self, load: list[int]) -> None:
        """Slots are int64 [places, slots] and hold all experts, whatever their load; which stays as it is."""
        given = torch.tensor(load)
        placed = self.make().place(given, 4)
        assert placed.dtype == torch.int64, f"got {placed.dtype}, expected int64"
        assert placed.dim() == 2, f"got {list(placed.shape)}, expected [places, slots]"
        assert len(placed) == 4, f"got {len(placed)} places, expected 4"
        assert set(placed.flatten().tolist()) == set(range(8)), f"{placed.tolist()} must hold experts 0 to 7"
        assert_equal(given, torch.tensor(load), "load after")

    def test_what_does_not_fit_is_refused(self) -> None:
        """More experts than slots."""
        try:
            self.make().place(torch.ones(800), 4)
        except ConfigError:
            return
        raise AssertionError("800 experts on 4 places: ConfigError was not raised")
