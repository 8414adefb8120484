"""StoredPrefixes: pages of prompts in a folder or an object store. docs/store.md describes the format."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, final

import google_crc32c
import torch
from torch import Tensor

from pikv.adapters.zarr_store import arrays
from pikv.adapters.zarr_store.objects import Bucket, Folder, Objects
from pikv.core.errors import ConfigError, StateError, StoreError
from pikv.core.files import as_buffer
from pikv.core.ports import PrefixStore
from pikv.core.worker import Worker

FOLDER = "prefixes"
CHECKSUM_BYTES = 4

_log = logging.getLogger(__name__)


@final
class StoredPrefixes(PrefixStore):
    """One object a page, in a local folder or in a store of obstore (S3, memory).

    store: a folder, which is made if it is not there, or a store of obstore. It may be that of a ZarrStreamer. at_once:
    the threads that write, and the requests that a read makes at a time. at_most: how many calls wait for each of the
    writing threads, before `write` waits.

    Nothing is synced: what a power cut damages is noticed when it is read, and computed again. Raises StoreError if the
    store cannot be used.
    """

    def __init__(self, store: Path | str | Any, *, at_once: int = 4, at_most: int = 8) -> None:
        if at_once < 1:
            raise ConfigError(f"at_once must be at least 1, got {at_once}; it is how many pages are written at a time")
        try:
            self._objects: Objects = Folder(Path(store)) if isinstance(store, (str, Path)) else Bucket(store)
        except OSError as error:
            raise StoreError(
                f"prefixes: {store} cannot be used ({error}); give it a folder or an object store"
            ) from error
        self._writers = [Worker(at_most=at_most) for _ in range(at_once)]
        self._readers = ThreadPoolExecutor(at_once, thread_name_prefix="prefixes")
        self._failed: list[StoreError] = []
        self._closed = False

    def write(self, names: Sequence[str], pages: Tensor) -> None:
        """Each thread gets every at_once-th page."""
        self._check_open()
        step = len(self._writers)
        for first, writer in enumerate(self._writers[: len(names)]):
            writer.submit(functools.partial(self._write, names[first::step], pages[first::step]))

    def _write(self, names: Sequence[str], pages: Tensor) -> None:
        for name, page in zip(names, pages, strict=True):
            try:
                self._objects.claim(_object_of(name), page.numpy().tobytes() + _checksum(page, name))
            except FileExistsError:  # somebody was quicker: it is the same page
                continue
            except OSError as error:
                self._failed.append(
                    StoreError(f"prefixes: page {name} could not be written to {self._objects} ({error})")
                )
                _log.warning("%s; whoever needs it computes it", self._failed[-1])

    def flush(self) -> None:
        """Wait for all threads."""
        self._check_open()
        for done in [writer.submit(_nothing) for writer in self._writers]:
            done.wait()
        failed, self._failed = self._failed, []
        if failed:
            raise StoreError(
                f"{failed[0]}, and {len(failed) - 1} more; look at the store, the pages will be computed again"
            ) from failed[0]

    def contains(self, names: Sequence[str]) -> Tensor:
        """Ask for each object."""
        self._check_open()
        try:
            found = list(self._readers.map(self._objects.exists, map(_object_of, names)))
        except OSError as error:
            raise StoreError(f"prefixes: {self._objects} cannot be asked for pages ({error})") from error
        return torch.tensor(found, dtype=torch.bool)

    def read(self, names: Sequence[str], out: Tensor) -> Tensor:
        """Get each object whole."""
        self._check_open()
        try:
            there = list(self._readers.map(self._read, names, out))
        except OSError as error:
            raise StoreError(f"prefixes: pages cannot be read from {self._objects} ({error})") from error
        return torch.tensor(there, dtype=torch.bool)

    def _read(self, name: str, page: Tensor) -> bool:
        try:
            states = self._objects.read(_object_of(name))
        except FileNotFoundError:
            return False
        if len(states) == len(page) + CHECKSUM_BYTES:
            as_buffer(page)[:] = memoryview(states)[:-CHECKSUM_BYTES]
            if states[-CHECKSUM_BYTES:] == _checksum(page, name):
                return True
        _log.warning("prefixes: page %s in %s is damaged; it is deleted, and computed again", name, self._objects)
        self._objects.delete([_object_of(name)])
        return False

    def collect(self, *, older_than_s: float) -> int:
        """Delete the pages that were written so many seconds ago or earlier; returns how many.

        What is deleted and needed again is computed, and written, again. Whatever a killed process left goes with them.
        """
        self._check_open()
        last = time.time() - older_than_s
        try:
            old = [name for name, written in self._objects.list(FOLDER).items() if written <= last]
            self._objects.delete(old)
        except OSError as error:
            raise StoreError(f"prefixes: old pages of {self._objects} cannot be deleted ({error})") from error
        return len(old)

    def close(self) -> None:
        """End the threads, once they have written what was taken."""
        self._closed = True
        for writer in self._writers:
            writer.close()
        self._readers.shutdown()

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("StoredPrefixes: it is closed; open another")


def _object_of(name: str) -> str:
    """The object of a page; folders of a few hundred are made of one of millions."""
    return f"{FOLDER}/{name[:2]}/{name}"


def _checksum(page: Tensor, name: str) -> bytes:
    """CRC-32C of a page and its name, so that a page under another's name is no page."""
    return int(google_crc32c.extend(arrays.checksum(page), name.encode())).to_bytes(CHECKSUM_BYTES, "little")


def _nothing() -> None:
    """What is done when all before it is."""
