"""The memory tier port: where sealed pages may lie while they live. And Ticket: work on pages that may take a while."""

from __future__ import annotations

import abc
from typing import final

import torch
from torch import Tensor

from pikv.core.errors import InputError
from pikv.core.ports.owner import Owner


class Ticket(abc.ABC):
    """Work on a batch of pages. Memory that the work was given is the work's until it is done."""

    @abc.abstractmethod
    def done(self) -> bool:
        """Whether nothing more will happen: the work is finished, has failed or was cancelled."""

    @abc.abstractmethod
    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the work is finished; raise what it raised, however often asked.

        Raises WaitTimeoutError after timeout_s seconds, while the work goes on; StateError if it was cancelled.
        """

    @abc.abstractmethod
    def cancel(self) -> bool:
        """Give up work that has not begun. Returns whether it was given up: then nothing of it has happened."""


@final
class Done(Ticket):
    """Work that was finished before anybody could ask."""

    def done(self) -> bool:
        """Yes."""
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        """Return at once."""

    def cancel(self) -> bool:
        """Too late."""
        return False


class MemoryTier(Owner):
    """A place for sealed pages, for as long as it is open. Pages never change, so a key is written once.

    A batch is n pages of one length; other batches may have another. All of a batch happens or nothing. An operation
    raises at once or when its ticket is waited for, and operations take effect in the order in which they are called.
    After `close` all of them but `close` raise StateError. One thread at a time calls.

    Owns what it opened: close it, or use it as a context manager.
    """

    capacity_bytes: int
    """The most bytes of pages that it takes."""

    @property
    @abc.abstractmethod
    def used_bytes(self) -> int:
        """The bytes that the pages it holds take of its capacity."""

    @abc.abstractmethod
    def write(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Store pages uint8 [n, page_bytes] on the CPU, contiguous, under keys int64 [n].

        Raises InputError for a key that is negative, comes twice or is held already; TierFullError, TierError.
        """

    @abc.abstractmethod
    def read(self, keys: Tensor, out: Tensor) -> Ticket:
        """Copy the pages of keys int64 [n] into out uint8 [n, page_bytes] on the CPU, contiguous.

        Raises PageLostError for a key without a page of this length, TierError. What is in out is then of no account.
        """

    @abc.abstractmethod
    def discard(self, keys: Tensor) -> None:
        """Forget the pages of keys int64 [n]; one that is not held is passed over."""

    @abc.abstractmethod
    def contains(self, keys: Tensor) -> Tensor:
        """Return which of keys int64 [n] are held: bool [n]."""

    @abc.abstractmethod
    def check_integrity(self) -> None:
        """Raise StateError unless its books add up."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what the tier holds, pages included. A second call does nothing."""


class AddressableTier(MemoryTier):
    """A tier whose pages lie in memory that the processor addresses: kernels may read them in place."""

    @abc.abstractmethod
    def slab(self, page_bytes: int) -> Tensor:
        """The memory of pages of this length: uint8 [rows, page_bytes]. Nobody but the tier writes to it."""

    @abc.abstractmethod
    def rows(self, keys: Tensor, page_bytes: int) -> Tensor:
        """Return the slab rows of keys int64 [n]: int64 [n]. Raises PageLostError."""


def check_batch(keys: Tensor, pages: Tensor) -> None:
    """Raise InputError unless keys are int64 [n], distinct and not negative, and pages bytes [n, page_bytes]."""
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise InputError(f"keys must be int64 [pages], got {keys.dtype} {list(keys.shape)}")
    if pages.dtype != torch.uint8 or pages.dim() != 2 or len(pages) != len(keys) or not pages.shape[1]:
        raise InputError(
            f"pages must be uint8 [pages, page_bytes] = [{len(keys)}, any], got {pages.dtype} {list(pages.shape)}"
        )
    if pages.device.type != "cpu" or not pages.is_contiguous():
        raise InputError(f"pages must be contiguous and on the CPU, got strides {pages.stride()} on {pages.device}")
    ascending = len(keys) and int(keys[0]) >= 0 and bool((keys.diff() > 0).all())  # as keys mostly are
    if not ascending and len(keys) and (int(keys.min()) < 0 or len(keys.unique()) != len(keys)):
        raise InputError(f"keys must be distinct and not negative, got {keys.tolist()}")
