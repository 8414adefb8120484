"""The streamer port: sealed pages and states that outlive the process, in versions."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, final

import attrs
from torch import Tensor

from pikv.core.errors import DamagedError
from pikv.core.ports.memory_tier import Ticket
from pikv.core.ports.owner import Owner


@attrs.frozen(order=True)
class Version:
    """One commit of a store; a later one has a higher number."""

    number: int

    def __str__(self) -> str:
        return str(self.number)


@attrs.frozen(kw_only=True, eq=False)
class Manifest:
    """All that a version holds but the bytes of its pages.

    facts: what JSON can say, under names. states: tensors on the CPU, under names. pages: for each length of page,
    page_bytes, the keys of the version's pages, int64 [n], distinct.
    """

    facts: Mapping[str, Any]
    states: Mapping[str, Tensor]
    pages: Mapping[int, Tensor]


class Streamer(Owner):
    """A durable history of pages and states. Pages never change, so a key is appended once and serves many versions.

    A version is whole or not there. What is read is checked, byte for byte, by checksums. One thread at a time calls;
    other processes may read meanwhile, and may commit: each gets version numbers of its own.

    Owns what it opened: close it, or use it as a context manager. After `close` all else raises StateError.
    """

    @abc.abstractmethod
    def append(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Take pages uint8 [n, page_bytes] on the CPU, contiguous, under keys int64 [n], for the versions to come.

        They are durable with the first version that names them. Raises InputError as MemoryTier.write does; StoreError
        here or at the commit.
        """

    @abc.abstractmethod
    def holds(self, keys: Tensor) -> Tensor:
        """Return which of keys int64 [n] a commit may name without an append: bool [n]."""

    @abc.abstractmethod
    def commit(self, manifest: Manifest) -> Version:
        """Make a version, durable when this returns. Changes nothing of the manifest.

        Raises PageLostError if a page that it names is not held; StoreError, and then no version was made, and pages
        may have to be appended again.
        """

    @abc.abstractmethod
    def versions(self) -> list[Version]:
        """All versions that there are, oldest first, damaged ones included."""

    @abc.abstractmethod
    def manifest(self, version: Version | None = None) -> Manifest:
        """Return a version's manifest; of the newest version by default.

        Raises VersionError if there is none, or if its format is newer than what is known here; DamagedError.
        """

    @abc.abstractmethod
    def read(self, version: Version, keys: Tensor, out: Tensor) -> Ticket:
        """Copy the pages of keys int64 [n] of a version into out uint8 [n, page_bytes] on the CPU, contiguous.

        Raises PageLostError for a key that the version does not have, in pages of this length; DamagedError, which
        names the keys of all pages that are missing or damaged, the others being right.
        """

    @abc.abstractmethod
    def check(self, version: Version) -> None:
        """Read all of a version and raise DamagedError unless every checksum is right; VersionError."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what the streamer holds; what was not committed is of no version. A second call does nothing."""

    @final
    def newest(self) -> Version | None:
        """The newest version, damaged or not; None if there is none."""
        return next(reversed(self.versions()), None)

    @final
    def newest_good(self) -> Version | None:
        """The newest version that is undamaged, all of it read and checked; None if there is none."""
        for version in reversed(self.versions()):
            try:
                self.check(version)
            except DamagedError:
                continue
            return version
        return None
