"""ZarrTier: live pages as Zarr arrays, in a folder or an object store."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from pikv.adapters.zarr_store import arrays
from pikv.adapters.zarr_store.objects import Bucket, Folder, Objects
from pikv.adapters.zarr_store.reading import read_pages
from pikv.adapters.zarr_store.segments import Segment
from pikv.core.errors import InputError, PageLostError, StateError, TierError, TierFullError
from pikv.core.files import as_buffer
from pikv.core.ports import Done, MemoryTier, Ticket
from pikv.core.ports.memory_tier import check_batch


@final
class ZarrTier(MemoryTier):
    """Each batch is one array, as `ZarrStreamer` writes them; every page is checked when it is read.

    store: a folder, which is made if it is not there, or a store of obstore (S3, memory). An array stays until half of
    its pages are discarded; then the others are written anew. So up to twice capacity_bytes are stored. `close` deletes
    all of it; what a killed process leaves is for whoever owns the folder.
    """

    def __init__(self, store: Path | str | Any, *, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._prefix, self._named = secrets.token_hex(8), 0
        self._places: dict[int, tuple[Segment, int]] = {}
        self._live: dict[str, set[int]] = {}
        self._closed = False
        try:
            self._objects: Objects = Folder(Path(store)) if isinstance(store, (str, Path)) else Bucket(store)
        except OSError as error:
            raise TierError(
                f"ZarrTier: {store} cannot be used ({error}); give it a folder or a store of obstore"
            ) from error

    @property
    def used_bytes(self) -> int:
        """The bytes of all pages held."""
        return sum(segment.page_bytes for segment, _ in self._places.values())

    def write(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Write an array."""
        self._check_open()
        check_batch(keys, pages)
        held = [key for key in keys.tolist() if key in self._places]
        if held:
            raise InputError(f"keys must be new, since pages never change, got {held[:8]} that are held already")
        if self.used_bytes + pages.nbytes > self.capacity_bytes:
            raise TierFullError(
                f"ZarrTier: {pages.nbytes} bytes are to be written and {self.used_bytes} of capacity_bytes="
                f"{self.capacity_bytes} are taken; discard some, or raise it"
            )
        if len(keys):
            self._write(keys.clone(), pages)
        return Done()

    def _write(self, keys: Tensor, pages: Tensor) -> None:
        self._named += 1
        segment = Segment(
            name=f"{self._prefix}-{self._named:06d}",
            page_bytes=pages.shape[1],
            keys=keys,
            checksums=torch.tensor(arrays.checksums(pages, range(len(pages))), dtype=torch.int64),
        )
        try:
            self._objects.write(segment.chunk, as_buffer(pages))
            self._objects.write(segment.metadata, memoryview(segment.encoded()))
        except OSError as error:
            self._delete(segment)
            raise TierError(
                f"ZarrTier: {len(keys)} pages could not be written to {self._objects} ({error}); make room there, or "
                "look at the network"
            ) from error
        self._places.update((key, (segment, row)) for row, key in enumerate(keys.tolist()))
        self._live[segment.name] = set(keys.tolist())

    def _delete(self, segment: Segment) -> None:
        self._live.pop(segment.name, None)
        with contextlib.suppress(OSError):  # nothing refers to it any more
            self._objects.delete([segment.chunk, segment.metadata])

    def read(self, keys: Tensor, out: Tensor) -> Ticket:
        """Read runs of pages of each array, and check each page."""
        self._check_open()
        check_batch(keys, out)
        parts: dict[str, tuple[Segment, list[tuple[int, int]]]] = {}
        for index, key in enumerate(keys.tolist()):
            segment, row = self._places.get(key, (None, 0))
            if segment is None or segment.page_bytes != out.shape[1]:
                raise PageLostError(f"ZarrTier: it holds no page of {out.shape[1]} bytes with key {key}")
            parts.setdefault(segment.name, (segment, []))[1].append((row, index))
        ordered = []
        for segment, places in parts.values():
            rows, index = torch.tensor(sorted(places), dtype=torch.int64).unbind(1)
            ordered.append((segment, index, rows))
        bad = read_pages(self._objects, ordered, out)
        if bad:
            raise PageLostError(
                f"ZarrTier: {len(bad)} of {len(keys)} pages are missing or damaged in {self._objects}, the first with "
                f"key {int(keys[bad[0]])}; look at the store, and compute them again"
            )
        return Done()

    def discard(self, keys: Tensor) -> None:
        """Forget the pages, and the arrays of which half is forgotten."""
        self._check_open()
        touched = {}
        for key in keys.tolist():
            if key in self._places:
                segment, _ = self._places.pop(key)
                self._live[segment.name].discard(key)
                touched[segment.name] = segment
        for segment in touched.values():
            if 2 * len(self._live[segment.name]) < len(segment.keys):
                self._shrink(segment)

    def _shrink(self, segment: Segment) -> None:
        """Write what is live anew; what cannot be read or written now stays where it is."""
        keys = torch.tensor(sorted(self._live[segment.name]), dtype=torch.int64)
        if len(keys):
            pages = torch.empty(len(keys), segment.page_bytes, dtype=torch.uint8)
            try:
                self.read(keys, pages)
                self._write(keys, pages)
            except (TierError, PageLostError):
                return
        self._delete(segment)

    def contains(self, keys: Tensor) -> Tensor:
        """Which keys are in an array."""
        self._check_open()
        return torch.tensor([key in self._places for key in keys.tolist()], dtype=torch.bool)

    def check_integrity(self) -> None:
        """Raise StateError unless the pages of all arrays are those that are held."""
        self._check_open()
        live = [key for keys in self._live.values() for key in keys]
        if sorted(live) != sorted(self._places):
            raise StateError("ZarrTier: its arrays are not what it holds; this is a defect of PiKV, please report it")

    def close(self) -> None:
        """Delete all arrays."""
        self._closed = True
        for segment in {segment.name: segment for segment, _ in self._places.values()}.values():
            self._delete(segment)
        self._places.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("ZarrTier: it is closed; make another")
