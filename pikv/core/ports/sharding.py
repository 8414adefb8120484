"""The sharding port: which place stores a token. A place is a rank of the transport."""

from __future__ import annotations

import abc

from torch import Tensor


class Sharding(abc.ABC):
    """Assign tokens to places. Settings only; the assignment depends on nothing but its arguments."""

    @abc.abstractmethod
    def owner(self, positions: Tensor, places: int) -> Tensor:
        """Return the place of each token: int64, the shape of positions, each below `places`."""
