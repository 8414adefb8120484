"""PageWriter: pages become segments, in the background."""

from __future__ import annotations

import secrets
from typing import final

import torch
from torch import Tensor

from pikv.adapters.zarr_store import arrays
from pikv.adapters.zarr_store.objects import Objects
from pikv.adapters.zarr_store.segments import Catalog, Segment, contains
from pikv.core.errors import InputError
from pikv.core.files import as_buffer
from pikv.core.ports import Done, Ticket
from pikv.core.ports.memory_tier import check_batch
from pikv.core.worker import Job, Worker


@final
class PageWriter:
    """Pages wait in memory until they fill a segment; a thread writes and syncs it while its caller goes on.

    catalog: of all segments that versions may refer to. prefix: of the names of all that this writer writes.
    """

    def __init__(self, objects: Objects, *, segment_bytes: int, at_most: int) -> None:
        self.catalog = Catalog()
        self.prefix = secrets.token_hex(8)
        self._objects, self._segment_bytes = objects, segment_bytes
        self._named = 0
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._jobs: list[tuple[Segment, Job]] = []
        self._worker = Worker(at_most=at_most)

    def new_name(self) -> str:
        """A name that no other array has."""
        self._named += 1
        return f"{self.prefix}-{self._named:06d}"

    def append(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Write pages that fill a segment; copy fewer, which then wait."""
        check_batch(keys, pages)
        held = keys[self.holds(keys)].tolist()
        if held:
            raise InputError(f"keys must be new, since pages never change, got {held[:8]} that are held already")
        if pages.nbytes >= self._segment_bytes:
            return self._write(keys.clone(), pages)
        waiting = self._waiting.setdefault(pages.shape[1], [])
        waiting.append((keys.clone(), pages.clone()))
        if sum(pages.nbytes for _, pages in waiting) >= self._segment_bytes:
            self._flush(pages.shape[1])
        return Done()

    def holds(self, keys: Tensor) -> Tensor:
        """Which of keys int64 [n] wait, are being written or are in a segment that is known here: bool [n]."""
        held = self.catalog.contains(keys)
        for parts in self._waiting.values():
            for some, _ in parts:
                held |= contains(some.sort().values, keys)
        return held

    def _flush(self, page_bytes: int) -> None:
        keys, pages = (torch.cat(parts) for parts in zip(*self._waiting.pop(page_bytes), strict=True))
        if len(keys):
            self._write(keys, pages)

    def _write(self, keys: Tensor, pages: Tensor) -> Job:
        """Checksums are taken here, while the thread still writes what came before."""
        checksums = torch.tensor(arrays.checksums(pages, range(len(pages))), dtype=torch.int64)
        segment = Segment(name=self.new_name(), page_bytes=pages.shape[1], keys=keys, checksums=checksums)

        def write() -> None:
            self._objects.write(segment.chunk, as_buffer(pages))
            self._objects.write(segment.metadata, memoryview(segment.encoded()))
            self._objects.sync([segment.chunk, segment.metadata])

        job = self._worker.submit(write)
        self.catalog.add([segment])
        self._jobs.append((segment, job))
        return job

    def finish(self) -> None:
        """Return when all pages are durable. Forgets those that could not be written, and raises OSError."""
        for page_bytes in list(self._waiting):
            self._flush(page_bytes)
        jobs, self._jobs = self._jobs, []
        failed: dict[str, OSError] = {}
        for segment, job in jobs:
            try:
                job.wait()
            except OSError as error:
                failed[segment.name] = error
        if failed:
            self.catalog.keep({segment.name for segment in self.catalog.segments} - set(failed))
            raise next(iter(failed.values()))

    def know(self, segments: list[Segment]) -> None:
        """Take segments that are in the store already into the catalog."""
        known = {segment.name for segment in self.catalog.segments}
        self.catalog.add([segment for segment in segments if segment.name not in known])

    def keep(self, names: set[str]) -> set[str]:
        """Forget all segments but these and those that are being written; returns the names of what is known."""
        self.catalog.keep(names | {segment.name for segment, _ in self._jobs})
        return {segment.name for segment in self.catalog.segments}

    def close(self) -> None:
        """End the thread, once it has written what it was given."""
        self._worker.close()
