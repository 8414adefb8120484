"""What every sharding must do: derive from this, say how yours is made, and run pytest."""

from __future__ import annotations

import torch

from pikv.core.ports import Sharding


class ShardingConformance:
    """The suite. `make` returns the sharding under test."""

    def make(self) -> Sharding:
        """The sharding under test."""
        raise TypeError(f"{type(self).__name__} must define make(), which returns the sharding under test")

    def test_every_token_has_one_place(self) -> None:
        """The owner is an int64 number of a place, in the shape of the positions."""
        positions = torch.arange(3000).view(3, 1000)
        for places in (1, 2, 3, 8):
            owner = self.make().owner(positions, places)
            assert owner.shape == positions.shape
            assert owner.dtype == torch.int64
            assert int(owner.min()) >= 0
            assert int(owner.max()) < places

    def test_one_place_owns_everything(self) -> None:
        """With one place there is nothing to decide."""
        assert not self.make().owner(torch.arange(500)[None], 1).any()

    def test_a_token_stands_alone(self) -> None:
        """The owner of a token does not depend on what it is asked about with."""
        positions = torch.arange(1000)[None]
        whole = self.make().owner(positions, 4)
        assert torch.equal(self.make().owner(positions[:, 300:301], 4), whole[:, 300:301])

    def test_places_fill_alike(self) -> None:
        """Over a long sequence no place owns more than its share by a tenth."""
        owners = self.make().owner(torch.arange(100_000)[None], 4).flatten()
        assert int(owners.bincount(minlength=4).max()) <= 1.1 * 25_000
