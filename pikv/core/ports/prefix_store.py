"""The prefix store port: pages of prompts that outlive the process, for whoever begins alike."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from torch import Tensor

from pikv.core.ports.owner import Owner


class PrefixStore(Owner):
    """Pages by names that say what they are of. Processes share it, and any thread may call.

    What has a name never changes. A page is there whole or not at all: of several that write one the first wins, and
    one that dies while it writes leaves nothing. Every page is checked when it is read; what is damaged is not there.

    Owns what it opened: close it, or use it as a context manager. After `close` all else raises StateError.
    """

    @abc.abstractmethod
    def write(self, names: Sequence[str], pages: Tensor) -> None:
        """Take pages uint8 [n, page_bytes] on the CPU, which are the store's from then on, and write them meanwhile.

        Others find each page as soon as it is written. Waits behind a backlog only. What goes wrong is logged, and said
        by the next `flush`.
        """

    @abc.abstractmethod
    def flush(self) -> None:
        """Return when all that was taken is written. Raises StoreError if something since the last flush was not."""

    @abc.abstractmethod
    def contains(self, names: Sequence[str]) -> Tensor:
        """Return which names have a page, damaged or not: bool [n]. Raises StoreError."""

    @abc.abstractmethod
    def read(self, names: Sequence[str], out: Tensor) -> Tensor:
        """Copy pages into out uint8 [n, page_bytes] on the CPU, contiguous; return which were there: bool [n].

        A page that is damaged, or of another length, is logged and deleted, so that it can be written again. Raises
        StoreError.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Write what was taken, and give back what the store holds. A second call does nothing."""
