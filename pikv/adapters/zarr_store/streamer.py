"""ZarrStreamer: versions of a cache as Zarr arrays. docs/store.md describes the format."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from pikv.adapters.zarr_store import arrays, manifests
from pikv.adapters.zarr_store.collecting import litter
from pikv.adapters.zarr_store.history import History
from pikv.adapters.zarr_store.manifests import Document
from pikv.adapters.zarr_store.objects import Bucket, Folder, Objects, store_errors
from pikv.adapters.zarr_store.segments import FOLDER
from pikv.adapters.zarr_store.writing import PageWriter
from pikv.core.errors import ConfigError, PageLostError, StateError, StoreError
from pikv.core.files import as_buffer
from pikv.core.ports import Done, Manifest, Streamer, Ticket, Version
from pikv.core.ports.memory_tier import check_batch


@final
class ZarrStreamer(Streamer):
    """Versions in a local folder, or in a store of obstore (S3, memory).

    store: a folder, which is made if it is not there, or a store of obstore. keep_versions: how many of the newest
    versions stay; older ones, and the pages that only they need, are deleted after each commit. None keeps all.
    segment_bytes: pages wait in memory until they fill so much, or for a commit. grace_s: what another process wrote
    and no version needs is deleted once it is older. at_most: how many segments wait for the thread that writes them,
    before `append` waits.

    Raises StoreError if the store cannot be used; VersionError if it is not PiKV's, or of a newer format.
    """

    def __init__(
        self,
        store: Path | str | Any,
        *,
        keep_versions: int | None = None,
        segment_bytes: int = 8 << 20,
        grace_s: float = 3600.0,
        at_most: int = 4,
    ) -> None:
        if keep_versions is not None and keep_versions < 1:
            raise ConfigError(f"keep_versions must be at least 1, or None to keep all, got {keep_versions}")
        self._keep_versions, self._grace_s = keep_versions, grace_s
        with store_errors(f"opening {store}"):
            self._objects: Objects = Folder(Path(store)) if isinstance(store, (str, Path)) else Bucket(store)
            self._make_groups()
        self._history = History(self._objects)
        self._writer = PageWriter(self._objects, segment_bytes=segment_bytes, at_most=at_most)
        self._segment_bytes = segment_bytes
        self._closed = False

    def _make_groups(self) -> None:
        """The root last: where it is, all groups are."""
        try:
            root = self._objects.read("zarr.json")
        except FileNotFoundError:
            root = arrays.group({"pikv_format": manifests.FORMAT})
            for name, group in ((FOLDER, arrays.group({})), (manifests.STATES, arrays.group({})), ("", root)):
                with contextlib.suppress(FileExistsError):  # another process was quicker
                    self._objects.create(f"{name}/zarr.json".lstrip("/"), group)
        manifests.check_root(root, str(self._objects))

    def append(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Pages that fill a segment are written by a thread; fewer are copied, and wait."""
        self._check_open()
        return self._writer.append(keys, pages)

    def holds(self, keys: Tensor) -> Tensor:
        """Pages that wait, are being written, or are in a segment of a version that was made or read here."""
        self._check_open()
        return self._writer.holds(keys)

    def commit(self, manifest: Manifest) -> Version:
        """Pages first, then the states, then the document, each durable before the next is written."""
        self._check_open()
        with store_errors("a commit"):
            self._writer.finish()
            segments = self._segments(manifest)
            pages = {f"pages/{page_bytes}": keys for page_bytes, keys in manifest.pages.items()}
            states, tensors = manifests.packed({**pages, **manifest.states})
            version = self._claim(manifest, segments, self._write_states(states), tensors)
        if self._keep_versions is not None:
            with contextlib.suppress(StoreError):  # the version stands: waste goes after the next one, or by `collect`
                self.collect()
        return version

    def _segments(self, manifest: Manifest) -> dict[str, int]:
        """The segments that hold the pages, with their checksums. Raises PageLostError."""
        segments: dict[str, int] = {}
        for page_bytes, keys in manifest.pages.items():
            for segment, which, _ in self._writer.catalog.find(keys):
                if segment.page_bytes != page_bytes:
                    raise PageLostError(
                        f"store: page {int(keys[which[0]])} has {segment.page_bytes} bytes, not {page_bytes}"
                    )
                segments[segment.name] = segment.checksum
        return segments

    def _write_states(self, states: Tensor) -> str:
        name, shape = self._writer.new_name(), (len(states),)
        chunk, metadata = (f"{manifests.STATES}/{name}/{each}" for each in (arrays.chunk_name(shape), "zarr.json"))
        self._objects.write(chunk, as_buffer(states))
        self._objects.write(metadata, memoryview(arrays.array(shape, {})))
        self._objects.sync([chunk, metadata])
        return name

    def _claim(self, manifest: Manifest, segments: dict[str, int], states: str, tensors: Any) -> Version:
        """Take the next number that nobody has."""
        number = max((version.number for version in self._history.versions()), default=0)
        while True:
            number += 1
            document = Document(number=number, facts=manifest.facts, segments=segments, states=states, tensors=tensors)
            with contextlib.suppress(FileExistsError):
                self._objects.create(manifests.name_of(number), document.encoded())
                return Version(number)

    def versions(self) -> list[Version]:
        """By the names of their documents."""
        self._check_open()
        with store_errors("listing versions"):
            return self._history.versions()

    def manifest(self, version: Version | None = None) -> Manifest:
        """Read the document and the states, and check both."""
        self._check_open()
        with store_errors("reading a version"):
            opened = self._history.open(version)
        self._writer.know(opened.catalog.segments)
        return opened.manifest

    def read(self, version: Version, keys: Tensor, out: Tensor) -> Ticket:
        """Read runs of pages, and check each page."""
        self._check_open()
        check_batch(keys, out)
        with store_errors(f"reading version {version}"):
            self._history.read(version, keys, out)
        return Done()

    def check(self, version: Version) -> None:
        """Read everything, a segment's bytes at a time."""
        self._check_open()
        self._history.forget()
        for page_bytes, keys in self.manifest(version).pages.items():
            for some in keys.split(max(1, self._segment_bytes // page_bytes)):
                self.read(version, some, torch.empty(len(some), page_bytes, dtype=torch.uint8))

    def collect(self) -> int:
        """Delete all but the newest keep_versions, and what belongs to no version; returns how many objects went.

        In one process at a time. What may yet be committed stays: what this streamer is writing, and what is younger
        than grace_s.
        """
        versions = self.versions()
        kept = versions if self._keep_versions is None else versions[-self._keep_versions :]
        with store_errors("collecting"):
            documents = [self._history.document(version) for version in kept]  # first: a damaged one must stop this
            gone = [manifests.name_of(version.number) for version in versions if version not in kept]
            self._objects.delete(gone)
            segments = self._writer.keep({name for document in documents for name in document.segments})
            segments |= {name for document in documents for name in document.segments}
            states = {document.states for document in documents}
            waste = litter(self._objects, segments, states, prefix=self._writer.prefix, grace_s=self._grace_s)
            self._objects.delete(waste)
        return len(gone) + len(waste)

    def close(self) -> None:
        """End the thread, once it has written what it was given."""
        self._closed = True
        self._writer.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("ZarrStreamer: it is closed; open another")
