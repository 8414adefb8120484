"""The sharding port: which place stores what. A place is a rank of the transport."""

from __future__ import annotations

import abc

from torch import Tensor


class Sharding(abc.ABC):
    """Assign tokens to places. Settings only; the assignment depends on nothing but its arguments."""

    @abc.abstractmethod
    def owner(self, positions: Tensor, places: int) -> Tensor:
        """Return the place of each token: int64, the shape of positions, each below `places`."""


class HeadSharding(Sharding):
    """Divide the KV heads too.

    Places form a grid: place p has group p mod groups of the heads, which stand side by side, and of these heads the
    tokens that `owner` gives to number p // groups of the places that share them.
    """

    @abc.abstractmethod
    def head_groups(self, kv_heads: int, places: int) -> int:
        """Return how many groups of the same number of heads there are, a divisor of places and of kv_heads.

        Raises ConfigError where these places do not divide such heads.
        """


class ExpertSharding(Sharding):
    """A token goes to the place of its best expert in the same layer, all KV heads together.

    That is known only when the layer has attended and the token was routed; until then `owner` says who stores it.
    """

    @abc.abstractmethod
    def place_of_expert(self, experts: int, places: int) -> Tensor:
        """Return the place of each expert: int64 [experts], each below `places`. Raises ConfigError for too few."""
