"""Named objects that are written once, whole: files of a folder, or objects of an object store."""

from __future__ import annotations

import abc
import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from pikv.core.errors import StoreError
from pikv.core.files import read_at, write_at

Ranges = Sequence[tuple[int, memoryview]]
"""Offsets in an object, and the memory for the bytes that begin there."""


class Objects(abc.ABC):
    """What a store is made of. Names have "/" between their parts. Whatever fails raises OSError."""

    @abc.abstractmethod
    def write(self, name: str, states: memoryview) -> None:
        """Write a new object; durable after `sync` only."""

    @abc.abstractmethod
    def sync(self, names: Iterable[str]) -> None:
        """Return when objects are durable, and can be found by their names after a power cut."""

    @abc.abstractmethod
    def create(self, name: str, states: bytes) -> None:
        """Write an object, whole and durable when this returns; FileExistsError if the name is taken."""

    @abc.abstractmethod
    def claim(self, name: str, states: bytes) -> None:
        """Write an object, whole as soon as it has its name; FileExistsError if that is taken.

        It is not synced: after a power cut it may be damaged.
        """

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Return a whole object. FileNotFoundError if there is none."""

    @abc.abstractmethod
    def read_ranges(self, name: str, ranges: Ranges) -> None:
        """Fill memory from an object."""

    @abc.abstractmethod
    def list(self, prefix: str) -> dict[str, float]:
        """The names that begin with prefix + "/", and when each was written, in seconds since 1970."""

    @abc.abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that are not there are passed over. Done when this returns, after a power cut too."""


@final
class Folder(Objects):
    """Files of a local folder. A file is complete before its name is, and synced before what refers to it."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._root.mkdir(parents=True, exist_ok=True)
        _sync(self._root.parent)

    def __str__(self) -> str:
        return str(self._root)

    def write(self, name: str, states: memoryview) -> None:
        """Write a new file."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_at(file, states, 0)
        finally:
            os.close(file)

    def sync(self, names: Iterable[str]) -> None:
        """Sync the files, then their folders."""
        paths = [self._root / name for name in names]
        for path in paths:
            _sync(path)
        self._sync_folders(paths)

    def _sync_folders(self, paths: Iterable[Path]) -> None:
        """Sync the folders that are in the root and have these paths in them, if they are there."""
        folders = {folder for path in paths for folder in path.parents if folder.is_relative_to(self._root)}
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            with contextlib.suppress(FileNotFoundError):
                _sync(folder)

    def create(self, name: str, states: bytes) -> None:
        """Write and sync a partial file, then give it its name."""
        with self._partial(name, states) as partial:
            _sync(partial)
            os.link(partial, self._root / name)  # unlike a rename it replaces nothing
        self._sync_folders([self._root / name])

    def claim(self, name: str, states: bytes) -> None:
        """Write a partial file, then give it its name."""
        with self._partial(name, states) as partial:
            os.link(partial, self._root / name)

    @contextlib.contextmanager
    def _partial(self, name: str, states: bytes) -> Iterator[Path]:
        """A file that nobody else writes, gone when this ends; of a process that is killed it stays."""
        partial = f"{name}.{secrets.token_hex(8)}.partial"
        self.write(partial, memoryview(states))
        try:
            yield self._root / partial
        finally:
            (self._root / partial).unlink()

    def exists(self, name: str) -> bool:
        """Look for a file."""
        return (self._root / name).exists()

    def read(self, name: str) -> bytes:
        """Read a file."""
        return (self._root / name).read_bytes()

    def read_ranges(self, name: str, ranges: Ranges) -> None:
        """Read parts of a file."""
        file = os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset, out in ranges:
                read_at(file, out, offset)
        finally:
            os.close(file)

    def list(self, prefix: str) -> dict[str, float]:
        """Walk through a folder."""
        found = {}
        for folder, _, files in os.walk(self._root / prefix):
            for file in files:
                path = Path(folder) / file
                with contextlib.suppress(FileNotFoundError):  # deleted by another process meanwhile
                    found[path.relative_to(self._root).as_posix()] = path.stat().st_mtime
        return found

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, and folders that are then empty."""
        paths = [self._root / name for name in names]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            with contextlib.suppress(OSError):  # it is not empty, or has never been
                folder.rmdir()
        self._sync_folders(paths)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@final
class Bucket(Objects):
    """Objects of any store of obstore: S3, memory and others. An object is durable once it is put."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __str__(self) -> str:
        return repr(self._store)

    def write(self, name: str, states: memoryview) -> None:
        """Put an object."""
        with _as_os_errors():
            obstore.put(self._store, name, bytes(states))  # a store in memory would keep the caller's memory

    def sync(self, names: Iterable[str]) -> None:
        """Nothing is left to do."""

    def create(self, name: str, states: bytes) -> None:
        """Put an object if there is none."""
        with _as_os_errors():
            obstore.put(self._store, name, states, mode="create")

    def claim(self, name: str, states: bytes) -> None:
        """Put an object if there is none."""
        self.create(name, states)

    def exists(self, name: str) -> bool:
        """Ask for an object's head."""
        with _as_os_errors():
            try:
                obstore.head(self._store, name)
            except FileNotFoundError:
                return False
        return True

    def read(self, name: str) -> bytes:
        """Get an object."""
        with _as_os_errors():
            return bytes(obstore.get(self._store, name).bytes())

    def read_ranges(self, name: str, ranges: Ranges) -> None:
        """Get parts of an object, all at once."""
        starts, lengths = [offset for offset, _ in ranges], [len(out) for _, out in ranges]
        with _as_os_errors():
            got = obstore.get_ranges(self._store, name, starts=starts, lengths=lengths)
        for part, (offset, out) in zip(got, ranges, strict=True):
            if len(part) != len(out):
                raise OSError(
                    f"the object ends {len(out) - len(part)} bytes before what is to be read at {offset} does"
                )
            out[:] = memoryview(part).cast("B")

    def list(self, prefix: str) -> dict[str, float]:
        """List the objects."""
        with _as_os_errors():
            listed = [each for some in obstore.list(self._store, prefix) for each in some]
        return {each["path"]: each["last_modified"].timestamp() for each in listed}

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects."""
        with _as_os_errors():
            obstore.delete(self._store, list(names))


@contextlib.contextmanager
def _as_os_errors() -> Any:
    try:
        yield
    except AlreadyExistsError as error:
        raise FileExistsError(_first_line(error)) from error
    except BaseError as error:
        raise OSError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]  # the others are the library's own


@contextlib.contextmanager
def store_errors(what: str) -> Iterator[None]:
    """Turn the system's errors into StoreError."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"store: {what} failed ({error}); what was committed before is unchanged. Look at the store and try again"
        ) from error
