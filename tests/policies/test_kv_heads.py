"""KV heads apart."""

from __future__ import annotations

import pytest
import torch

import pikv
from pikv.core.ports import Sharding
from pikv.policies import KvHeads
from pikv.testing.sharding import ShardingConformance


class TestKvHeads(ShardingConformance):
    """The shipped suite, of the places that share a group of heads."""

    def make(self) -> Sharding:
        return KvHeads(tokens=64)


@pytest.mark.parametrize(("kv_heads", "places", "groups"), [(8, 1, 1), (8, 2, 2), (8, 8, 8), (2, 4, 2), (1, 3, 1)])
def test_heads_are_divided_as_far_as_there_are_heads(kv_heads: int, places: int, groups: int) -> None:
    """Each place its own heads, or several places the tokens of one head."""
    assert KvHeads().head_groups(kv_heads, places) == groups


def test_ranks_that_do_not_fit_the_heads_are_refused() -> None:
    """With what would fit."""
    with pytest.raises(pikv.ConfigError, match=r"divides the 6 KV heads.*got 4.*TokenRange"):
        KvHeads().head_groups(6, 4)


def test_places_of_one_head_take_turns() -> None:
    """As token ranges do."""
    owner = KvHeads(tokens=2).owner(torch.arange(8)[None], 2)
    assert owner.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]
