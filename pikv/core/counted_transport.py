"""Counted: how many bytes go over a transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from pikv.core.ports.transport import Transport


@final
class Counted(Transport):
    """A transport that adds up what this rank sends to others. What it stands on stays its maker's to close.

    sent_bytes: tensors' bytes, once for each rank that gets them; a library may pass them on by other ways, and adds
    envelopes of its own. calls: operations, of which barriers send nothing. Both may be set back to 0.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.sent_bytes, self.calls = 0, 0

    @property
    def rank(self) -> int:
        """The rank below."""
        return self.transport.rank

    @property
    def size(self) -> int:
        """The size below."""
        return self.transport.size

    def broadcast(self, tensor: Tensor, *, root: int) -> Tensor:
        """Count the tensor for every other rank, at the root."""
        received = self.transport.broadcast(tensor, root=root)
        self._count(tensor.nbytes * (self.size - 1) if self.rank == root else 0)
        return received

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Count the tensor for every other rank."""
        received = self.transport.all_gather(tensor)
        self._count(tensor.nbytes * (self.size - 1))
        return received

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Count the tensor for every other rank, since a sum of the same bits everywhere is made of all terms."""
        received = self.transport.all_reduce(tensor)
        self._count(tensor.nbytes * (self.size - 1))
        return received

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Count the parts for other ranks."""
        received = self.transport.all_to_all(parts)
        self._count(sum(part.nbytes for rank, part in enumerate(parts) if rank != self.rank))
        return received

    def barrier(self) -> None:
        """Send nothing."""
        self.transport.barrier()
        self._count(0)

    def close(self) -> None:
        """Do nothing: the transport below is its maker's."""

    def _count(self, nbytes: int) -> None:
        self.sent_bytes += nbytes
        self.calls += 1
