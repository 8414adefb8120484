"""Token ranges in turn."""

from __future__ import annotations

import pytest
import torch

import pikv
from pikv.core.ports import Sharding
from pikv.policies import TokenRange
from pikv.testing.sharding import ShardingConformance


class TestTokenRange(ShardingConformance):
    """The shipped suite."""

    def make(self) -> Sharding:
        return TokenRange(tokens=64)


def test_ranges_go_around() -> None:
    """Of two places the first owns positions 0-1 and 4-5, the second 2-3 and 6-7."""
    owner = TokenRange(tokens=2).owner(torch.arange(8)[None], 2)
    assert owner.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]


def test_an_empty_range_is_refused() -> None:
    """A range has at least one token."""
    with pytest.raises(pikv.ConfigError, match="tokens of TokenRange must be a whole number of at least 1, got 0"):
        TokenRange(tokens=0)
