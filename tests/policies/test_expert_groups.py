"""Tokens where their experts are."""

from __future__ import annotations

from pikv.core.ports import Sharding
from pikv.policies import ExpertGroups
from pikv.testing.sharding import ShardingConformance


class TestExpertGroups(ShardingConformance):
    """The shipped suite, of who has a token until it is routed."""

    def make(self) -> Sharding:
        return ExpertGroups(tokens=64)


def test_experts_go_around() -> None:
    """As the example's expert weights do."""
    assert ExpertGroups().place_of_expert(5, 2).tolist() == [0, 1, 0, 1, 0]
