"""The inner port Transport: the collectives PiKV needs between ranks, and Solo, the rank that is alone."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from pikv.core.errors import InputError
from pikv.core.ports.owner import Owner


class Transport(Owner):
    """Collectives over a fixed group of ranks.

    Every rank calls the same operations in the same order. No operation changes its inputs, and no result shares
    memory with them. An operation that cannot be carried out raises TransportError, arguments that are wrong by
    themselves raise InputError; what the ranks must agree on (shapes, dtypes, the root) is the callers' promise.

    Owns what it opened: close it, or use it as a context manager.
    """

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """This rank's number, from 0 to size - 1."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """How many ranks there are."""

    @abc.abstractmethod
    def broadcast(self, tensor: Tensor, *, root: int) -> Tensor:
        """Return the root's tensor. The others pass one of the same shape and dtype, whose values do not matter."""

    @abc.abstractmethod
    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's tensor, [size, *shape], in the order of ranks. Shape and dtype are the same on all."""

    @abc.abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, of the shape and dtype of `tensor`; the same bits on every rank."""

    @abc.abstractmethod
    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send parts[r] to rank r and return what each rank sent here, in the order of ranks.

        Parts are [rows, *shape]. Rows may differ from part to part and may be 0, receivers learn them; shape and
        dtype are the same for all parts of all ranks.
        """

    @abc.abstractmethod
    def barrier(self) -> None:
        """Return when every rank has called it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what the transport holds. A second call does nothing; no other operation may follow."""

    @final
    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size})"


def check_root(root: int, size: int) -> None:
    """Raise InputError unless `root` is a rank."""
    if not 0 <= root < size:
        raise InputError(f"root must be a rank from 0 to {size - 1}, got {root}; pass the rank that holds the tensor")


def check_parts(parts: Sequence[Tensor], size: int) -> None:
    """Raise InputError unless there is a part for every rank, all of one dtype and one shape behind dimension 0."""
    if len(parts) != size:
        raise InputError(f"all_to_all needs a part for each of {size} ranks, got {len(parts)}; pass empty parts too")
    kinds = {(part.dtype, tuple(part.shape[1:])) for part in parts}
    if len(kinds) > 1 or any(part.dim() == 0 for part in parts):
        shapes = [f"{part.dtype} {list(part.shape)}" for part in parts]
        raise InputError(f"parts must be [rows, *shape] of one shape and dtype, got {shapes}; only rows may differ")


def as_bytes(tensor: Tensor) -> Tensor:
    """View a tensor as uint8 [bytes], or its copy if it is not contiguous: what travels has no dtype."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@final
class Solo(Transport):
    """The only rank of its group: every operation is a copy."""

    @property
    def rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def size(self) -> int:
        """Always 1."""
        return 1

    def broadcast(self, tensor: Tensor, *, root: int) -> Tensor:
        """Return a copy."""
        check_root(root, self.size)
        return tensor.clone()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return a copy, [1, *shape]."""
        return tensor.clone().unsqueeze(0)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return a copy."""
        return tensor.clone()

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return a copy of the one part."""
        check_parts(parts, self.size)
        return [part.clone() for part in parts]

    def barrier(self) -> None:
        """Return at once."""

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""
