"""Inspection: what a store holds, and whether all of it is as it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from pikv.adapters.zarr_store import manifests
from pikv.adapters.zarr_store.history import History, Opened
from pikv.adapters.zarr_store.objects import Bucket, Folder, Objects, store_errors
from pikv.adapters.zarr_store.reading import AT_ONCE, read_pages
from pikv.adapters.zarr_store.segments import Segment
from pikv.core.errors import VersionError
from pikv.core.ports import Version

_UNREAD, _RIGHT, _WRONG = 0, 1, 2


@final
class Inspection:
    """The versions of a store, each page read and checked once however many of them need it. Changes nothing.

    store: as ZarrStreamer takes it, but a folder must be there. Raises VersionError where there is no store of PiKV's,
    or one of a newer format; StoreError.
    """

    def __init__(self, store: Path | str | Any) -> None:
        nothing = f"{store} holds no PiKV store: it has no zarr.json; give what ZarrStreamer was given"
        if isinstance(store, (Path, str)) and not Path(store).is_dir():
            raise VersionError(nothing)
        with store_errors(f"opening {store}"):
            self._objects: Objects = Folder(Path(store)) if isinstance(store, (Path, str)) else Bucket(store)
            try:
                manifests.check_root(self._objects.read("zarr.json"), str(store))
            except FileNotFoundError as error:
                raise VersionError(nothing) from error
        self._history = History(self._objects)
        self._checked: dict[str, Tensor] = {}
        """Of each segment by name, what is known of its rows: int8 [pages]."""

    def versions(self) -> dict[Version, float]:
        """All that there are, oldest first, and when each was committed, in seconds since 1970."""
        with store_errors("listing versions"):
            written = self._objects.list(manifests.FOLDER)
            return {version: written[manifests.name_of(version.number)] for version in self._history.versions()}

    def open(self, version: Version) -> Opened:
        """Read a version's document, states and segments' metadata. Raises DamagedError, VersionError, StoreError."""
        with store_errors(f"reading version {version}"):
            return self._history.open(version)

    def unread_bytes(self, opened: Opened) -> int:
        """The bytes of those of a version's pages that were not yet checked here."""
        return sum(
            int((self._known(segment)[rows] == _UNREAD).sum()) * segment.page_bytes
            for keys in opened.keys.values()
            for segment, _, rows in opened.catalog.find(keys[opened.catalog.contains(keys)])
        )

    def damaged(self, opened: Opened, advanced: Callable[[int], object]) -> tuple[int, ...]:
        """The keys of a version's pages that are missing or damaged. advanced: is told of bytes as they are read."""
        bad: list[int] = []
        for keys in opened.keys.values():
            there = opened.catalog.contains(keys)
            bad += keys[~there].tolist()
            for segment, which, rows in opened.catalog.find(keys[there]):
                self._check(segment, rows, advanced)
                bad += keys[there][which][self._known(segment)[rows] == _WRONG].tolist()
        return tuple(bad)

    def _known(self, segment: Segment) -> Tensor:
        return self._checked.setdefault(segment.name, torch.zeros(len(segment.keys), dtype=torch.int8))

    def _check(self, segment: Segment, rows: Tensor, advanced: Callable[[int], object]) -> None:
        """Read those of a segment's rows int64 [n] that were not yet."""
        known = self._known(segment)
        for some in rows[known[rows] == _UNREAD].split(max(1, 8 * AT_ONCE // segment.page_bytes)):
            out = torch.empty(len(some), segment.page_bytes, dtype=torch.uint8)
            wrong = read_pages(self._objects, [(segment, torch.arange(len(some)), some)], out)
            known[some] = _RIGHT
            known[some[wrong]] = _WRONG
            advanced(out.nbytes)
