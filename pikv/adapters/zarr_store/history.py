"""History: the versions of a store, as they are read."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.adapters.zarr_store import arrays, manifests
from pikv.adapters.zarr_store.manifests import Document
from pikv.adapters.zarr_store.objects import Objects
from pikv.adapters.zarr_store.reading import read_pages
from pikv.adapters.zarr_store.segments import FOLDER, Catalog, Segment, contains
from pikv.core.errors import DamagedError, PageLostError, VersionError
from pikv.core.files import as_buffer
from pikv.core.ports import Manifest, Version


@attrs.frozen(kw_only=True)
class Opened:
    """A version whose manifest was read and checked.

    keys: of its pages, by their length, ascending. catalog: its segments whose metadata is undamaged.
    """

    version: Version
    manifest: Manifest
    keys: dict[int, Tensor]
    catalog: Catalog


@final
class History:
    """What was committed to a store, by whoever."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._opened: Opened | None = None

    def versions(self) -> list[Version]:
        """All that have a document, oldest first."""
        numbers = [manifests.number_of(name) for name in self._objects.list(manifests.FOLDER)]
        return [Version(number) for number in sorted(number for number in numbers if number is not None)]

    def document(self, version: Version) -> Document:
        """Read a version's document. Raises VersionError if there is none, DamagedError."""
        try:
            document = self._objects.read(manifests.name_of(version.number))
        except FileNotFoundError as error:
            there = ", ".join(map(str, self.versions())) or "none"
            raise VersionError(f"{self._objects} has no version {version}, it has: {there}") from error
        return Document.decoded(version.number, document)

    def open(self, version: Version | None) -> Opened:
        """Read a version's document, states and segments' metadata; the newest by default. The last one is kept."""
        if version is None:
            versions = self.versions()
            if not versions:
                raise VersionError(f"{self._objects} has no version yet; commit one")
            version = versions[-1]
        if self._opened is None or self._opened.version != version:
            document = self.document(version)
            manifest = self._manifest(document)
            self._opened = Opened(
                version=version,
                manifest=manifest,
                keys={page_bytes: keys.sort().values for page_bytes, keys in manifest.pages.items()},
                catalog=Catalog(self._segments(document)),
            )
        return self._opened

    def forget(self) -> None:
        """Read everything from the store again."""
        self._opened = None

    def _manifest(self, document: Document) -> Manifest:
        run = torch.empty(manifests.states_bytes(document), dtype=torch.uint8)
        name = f"{manifests.STATES}/{document.states}/{arrays.chunk_name(run.shape)}"
        try:
            self._objects.read_ranges(name, [(0, as_buffer(run))] if len(run) else [])
        except OSError as error:
            raise DamagedError(f"version {document.number}: its states cannot be read ({error})") from error
        states = manifests.unpacked(run, document)
        pages = {int(name[6:]): states.pop(name) for name in list(states) if name.startswith("pages/")}
        return Manifest(facts=document.facts, states=states, pages=pages)

    def _segments(self, document: Document) -> list[Segment]:
        """Those whose metadata is undamaged; of the others all pages are missing."""
        segments = []
        for name, expected in document.segments.items():
            try:
                metadata = self._objects.read(f"{FOLDER}/{name}/zarr.json")
                arrays.check(metadata, expected, f"segment {name}")
            except OSError:
                continue
            segments.append(Segment.decoded(name, metadata))
        return segments

    def read(self, version: Version, keys: Tensor, out: Tensor) -> None:
        """See Streamer.read."""
        opened = self.open(version)
        lost = keys[~contains(opened.keys.get(out.shape[1], keys[:0]), keys)].tolist()
        if lost:
            raise PageLostError(f"version {version}: it has no page of {out.shape[1]} bytes with key {lost[0]}")
        known = opened.catalog.contains(keys)
        there = torch.nonzero(known).flatten()
        parts = ((segment, there[which], rows) for segment, which, rows in opened.catalog.find(keys[there]))
        damaged = keys[read_pages(self._objects, parts, out)].tolist() + keys[~known].tolist()
        if damaged:
            raise DamagedError(
                f"version {version}: {len(damaged)} of {len(keys)} pages are missing or damaged, the first with key "
                f"{damaged[0]}",
                tuple(damaged),
            )
