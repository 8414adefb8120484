"""FaultyTier: what may go wrong with a device, for tests of what stands on a tier."""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor

from pikv.core.errors import TierError
from pikv.core.over_tier import OverTier
from pikv.core.ports.memory_tier import Done, MemoryTier, Ticket

Fault = Literal["fails to write", "fails to read", "lies", "loses", "truncates"]


@final
class FaultyTier(OverTier):
    """A tier with a fault while `fault` is set. It passes the suite of MemoryTier while it is None.

    fails to write, fails to read: TierError, as from a full disk or a broken device. lies: one bit of the first page
    of a batch is another when it is read. loses: the first page of a batch is gone before it is read. truncates: the
    last page of a batch comes back with zeros for its second half.
    """

    def __init__(self, tier: MemoryTier, fault: Fault | None = None) -> None:
        super().__init__(tier)
        self.fault, self.injected = fault, 0

    def write(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Write, or fail to."""
        self._fail("fails to write")
        return self.tier.write(keys, pages)

    def read(self, keys: Tensor, out: Tensor) -> Ticket:
        """Read, or fail to, or read what was not written."""
        self._fail("fails to read")
        if len(keys) and self.fault in ("lies", "loses", "truncates"):
            self.injected += 1
            if self.fault == "loses":
                self.tier.discard(keys[:1])
        self.tier.read(keys, out).wait()
        if self.fault == "lies" and len(keys):
            out[0, out.shape[1] // 3] ^= 16
        if self.fault == "truncates" and len(keys):
            out[-1, out.shape[1] // 2 :] = 0
        return Done()

    def _fail(self, fault: Fault) -> None:
        if self.fault == fault:
            self.injected += 1
            raise TierError(f"FaultyTier: it {fault}, as it was told to")
