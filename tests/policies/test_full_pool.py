from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv.core.exact import Refuse
from pikv.core.ports import FullPool
from pikv.policies import EvictOldest
from pikv.testing.full_pool import FullPoolConformance
from pikv.testing.requests import sealed_pages

pytestmark = pytest.mark.property


class TestRefuse(FullPoolConformance):
    def make(self) -> Refuse:
        return Refuse()

    def test_nothing_leaves(self):
        """However many pages there are."""
        assert Refuse().leaving(torch.tensor([[[3, 7, 9]]]), 1) is None


class TestEvictOldest(FullPoolConformance):
    def make(self) -> EvictOldest:
        return EvictOldest()

    @given(newest=sealed_pages(), first_pages=st.integers(0, 2), needed=st.integers(1, 20))
    def test_the_oldest_leave_and_the_first_stay(self, newest, first_pages, needed):
        """All that leave are older than all that stay, but for each row's first pages; None if these are too many."""
        leaving = EvictOldest(first_pages=first_pages).leaving(newest, needed)
        movable = newest >= 0
        movable[..., :first_pages] = False
        if leaving is None:
            assert int(movable.sum()) < needed
            return
        assert not leaving[..., :first_pages].any()
        staying = newest[movable & ~leaving]
        assert not len(staying) or int(newest[leaving].max()) < int(staying.min())

    def test_heads_leave_in_step(self):
        """Pages that end at the same token leave together, though fewer were needed."""
        newest = torch.tensor([[[15, 31, 47], [15, 31, 47]]])
        leaving = EvictOldest().leaving(newest, 1)
        assert leaving.tolist() == [[[False, True, False]] * 2]

    def test_no_more_leave_than_the_ties_demand(self):
        """Of pages that all end elsewhere exactly the needed ones leave."""
        leaving = EvictOldest().leaving(torch.tensor([[[10, 20, 30, -1], [11, 21, 31, 41]]]), 2)
        assert leaving.tolist() == [[[False, True, False, False], [False, True, False, False]]]


@attrs.frozen(eq=False)
class Broken(FullPool):
    """EvictOldest with one defect, named by the test of the suite that must find it; and no value, for all of them."""

    defect: str

    def leaving(self, newest, pages_needed):
        if self.defect == "it_changes_nothing":
            newest.zero_()
        return EvictOldest().leaving(newest, max(pages_needed - 1, 1))


@pytest.mark.slow  # hypothesis looks for the simplest case of each
@pytest.mark.parametrize(
    "defect", ["enough_pages_leave_or_none", "equal_settings_are_equal_and_hash_alike", "it_changes_nothing"]
)
def test_the_suite_finds_a_defect(defect):
    """Each test of the suite fails for a full pool that breaks the fact it states."""

    class Suite(FullPoolConformance):
        def make(self) -> FullPool:
            return Broken(defect)

    with pytest.raises((AssertionError, ExceptionGroup)):
        getattr(Suite(), f"test_{defect}")()
