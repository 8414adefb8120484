"""OverTier: what a tier that stands on another one leaves to it."""

from __future__ import annotations

from typing import final

from torch import Tensor

from pikv.core.ports.memory_tier import MemoryTier


class OverTier(MemoryTier):
    """A tier whose pages another tier holds; how they are written and read is what it adds. Closes the tier below."""

    def __init__(self, tier: MemoryTier) -> None:
        self.tier, self.capacity_bytes = tier, tier.capacity_bytes

    @property
    @final
    def used_bytes(self) -> int:
        """The bytes that the tier below uses."""
        return self.tier.used_bytes

    @final
    def discard(self, keys: Tensor) -> None:
        """Forget them below, at once."""
        self.tier.discard(keys)

    @final
    def contains(self, keys: Tensor) -> Tensor:
        """Which the tier below holds."""
        return self.tier.contains(keys)

    @final
    def check_integrity(self) -> None:
        """Check the tier below."""
        self.tier.check_integrity()

    @final
    def close(self) -> None:
        """Close the tier below."""
        self.tier.close()
