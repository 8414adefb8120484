"""FileTier: pages in rows of a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import final

from torch import Tensor

from pikv.core.directory import Directory, runs
from pikv.core.errors import StateError, TierError
from pikv.core.files import as_buffer, read_at, write_at
from pikv.core.ports.memory_tier import Done, MemoryTier, Ticket, check_batch


@final
class FileTier(MemoryTier):
    """Pages in one file for each length of page, in a folder of any file system.

    The files have no name: they are gone with the process, however it ends. They grow as pages are written, up to
    capacity_bytes, and rows are used again; nothing is synced, since a live page needs no durability.

    Raises TierError if the folder cannot be written to.
    """

    def __init__(self, folder: Path | str, *, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._folder = Path(folder)
        self._directory = Directory(capacity_bytes)
        self._files: dict[int, int] | None = {}
        os.close(self._open_file())  # a folder that cannot be used is refused now, not in the middle of a text

    @property
    def used_bytes(self) -> int:
        """The bytes of all pages held."""
        return self._directory.used_bytes

    def write(self, keys: Tensor, pages: Tensor) -> Ticket:
        """Write each run of rows by one call."""
        check_batch(keys, pages)
        file = self._file(pages.shape[1])
        rows, states = self._directory.add(keys, pages.shape[1]), as_buffer(pages)
        try:
            for first, row, count in runs(rows):
                part = slice(first * pages.shape[1], (first + count) * pages.shape[1])
                write_at(file, states[part], row * pages.shape[1])
        except OSError as error:
            self._directory.drop(keys)
            raise TierError(
                f"FileTier: {len(keys)} pages could not be written to {self._folder} ({error}); make room there, or "
                "give it a smaller capacity_bytes"
            ) from error
        return Done()

    def read(self, keys: Tensor, out: Tensor) -> Ticket:
        """Read each run of rows by one call."""
        check_batch(keys, out)
        file = self._file(out.shape[1])
        states = as_buffer(out)
        try:
            for first, row, count in runs(self._directory.find(keys, out.shape[1])):
                part = slice(first * out.shape[1], (first + count) * out.shape[1])
                read_at(file, states[part], row * out.shape[1])
        except OSError as error:
            raise TierError(f"FileTier: {len(keys)} pages could not be read in {self._folder} ({error})") from error
        return Done()

    def discard(self, keys: Tensor) -> None:
        """Free the rows; the file keeps its length."""
        self._open()
        self._directory.drop(keys)

    def contains(self, keys: Tensor) -> Tensor:
        """Which keys have a row."""
        self._open()
        return self._directory.contains(keys)

    def check_integrity(self) -> None:
        """Raise StateError unless every row is free or one page's."""
        self._open()
        self._directory.check_integrity()

    def close(self) -> None:
        """Close the files, which ends them."""
        files, self._files = self._files or {}, None
        for file in files.values():
            os.close(file)

    def _open(self) -> dict[int, int]:
        if self._files is None:
            raise StateError("FileTier: it is closed; make another")
        return self._files

    def _file(self, page_bytes: int) -> int:
        files = self._open()
        if page_bytes not in files:
            files[page_bytes] = self._open_file()
        return files[page_bytes]

    def _open_file(self) -> int:
        try:
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
                return os.dup(file.fileno())
        except OSError as error:
            raise TierError(
                f"FileTier: no file can be made in {self._folder} ({error}); give it a folder that exists and can be "
                "written to"
            ) from error
