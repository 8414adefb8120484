"""The Zarr store: the suite on a folder and in memory, what other Zarr readers see, retention, and faults."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest
import torch
import zarr
from object_store import ObjectStoreConformance
from obstore.store import LocalStore, MemoryStore

import pikv
from pikv.adapters.zarr_store import ZarrStreamer
from pikv.adapters.zarr_store.objects import Folder
from pikv.core.ports import Version
from pikv.testing.memory_tier import PAGE_BYTES, numbers, pages_of
from pikv.testing.streamer import StreamerConformance, check_pages, manifest_of


class TestFolder(StreamerConformance):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory):
        self.root = tmp_path_factory.mktemp("store")

    def open(self):
        return ZarrStreamer(self.root, segment_bytes=2 * PAGE_BYTES)

    def objects(self):
        return {str(p.relative_to(self.root)): p.read_bytes() for p in sorted(self.root.rglob("*")) if p.is_file()}

    def put(self, name, states):
        path = self.root / name
        path.unlink(missing_ok=True)
        if states is not None:
            path.write_bytes(states)


class TestMemory(ObjectStoreConformance):
    @pytest.fixture(autouse=True)
    def memory(self):
        self.store = MemoryStore()


def commit(streamer, *new, before=()):
    streamer.append(numbers(*new), pages_of(numbers(*new)))
    return streamer.commit(manifest_of(*before, *new))


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- the format


def test_zarr_reads_what_was_written(tmp_path):
    """Groups and arrays, with the keys and checksums of pages in an array's attributes."""
    with ZarrStreamer(tmp_path) as streamer:
        commit(streamer, 1, 2, 3)
    group = zarr.open_group(tmp_path, mode="r")
    assert group.attrs["pikv_format"] == 1
    ((name, array),) = group["segments"].arrays()
    assert torch.equal(torch.from_numpy(array[:]), pages_of(numbers(1, 2, 3)))
    assert array.attrs["page_bytes"] == PAGE_BYTES
    assert {"keys", "crc32c"} <= set(array.attrs)
    ((_, states),) = group["states"].arrays()
    assert states.dtype == "uint8"
    assert json.loads((tmp_path / "manifests/000000000001").read_text()[9:])["segments"].keys() == {name}


def test_only_new_pages_are_written(tmp_path):
    """A commit of nothing new writes no segment; one of one page a segment of one page."""
    with ZarrStreamer(tmp_path) as streamer:
        commit(streamer, 1, 2, 3)
        before = {name for name in names(tmp_path) if name.startswith("segments")}
        streamer.commit(manifest_of(3, 1))
        assert {name for name in names(tmp_path) if name.startswith("segments")} == before
        version = commit(streamer, 4, before=(1, 2, 3))
        (new,) = (
            {name for name in names(tmp_path) if name.startswith("segments")}
            - before
            - {name for name in names(tmp_path) if name.endswith("zarr.json")}
        )
        assert (tmp_path / new).stat().st_size == PAGE_BYTES
        check_pages(streamer, version, 4, 3, 2, 1)


@pytest.mark.parametrize("where", ["zarr.json", "manifests/000000000001"])
def test_a_newer_format_is_refused(tmp_path, where):
    """VersionError, which says what can be read and what to do."""
    with ZarrStreamer(tmp_path) as streamer:
        commit(streamer, 1)
    text = (tmp_path / where).read_bytes()
    if where == "zarr.json":
        (tmp_path / where).write_bytes(text.replace(b'"pikv_format":1', b'"pikv_format":2'))
    else:
        from pikv.adapters.zarr_store import arrays

        newer = text[9:].replace(b'"format":1', b'"format":2')
        (tmp_path / where).write_bytes(b"%08x\n" % arrays.checksum(newer) + newer)
    with pytest.raises(pikv.VersionError, match="has format 2, and this PiKV reads up to 1; use a newer PiKV"):
        ZarrStreamer(tmp_path).manifest()


def test_another_groups_folder_is_refused(tmp_path):
    """And left as it is."""
    zarr.create_group(tmp_path)
    before = names(tmp_path)
    with pytest.raises(pikv.VersionError, match="give PiKV a folder of its own"):
        ZarrStreamer(tmp_path)
    assert names(tmp_path) == before


def test_obstores_local_store_reads_the_same(tmp_path):
    """A folder is a folder, whoever opens it."""
    with ZarrStreamer(tmp_path) as streamer:
        version = commit(streamer, 1, 2)
    with ZarrStreamer(LocalStore(tmp_path)) as streamer:
        check_pages(streamer, version, 2, 1)
        commit(streamer, 3)
    with ZarrStreamer(tmp_path) as streamer:
        check_pages(streamer, streamer.versions()[-1], 3)


# --- retention


def test_only_the_newest_versions_are_kept(tmp_path):
    """Pages that older ones alone needed go; those that are needed still, or again, stay."""
    with ZarrStreamer(tmp_path, keep_versions=2, segment_bytes=PAGE_BYTES) as streamer:
        for key in range(5):
            streamer.append(numbers(key), pages_of(numbers(key)))
            streamer.commit(manifest_of(0, key) if key else manifest_of(0))
        assert streamer.versions() == [Version(4), Version(5)]
        check_pages(streamer, Version(4), 3, 0)
        check_pages(streamer, Version(5), 0, 4)
        assert streamer.holds(torch.arange(5)).tolist() == [True, False, False, True, True]
        commit(streamer, 1, before=(0,))
        assert len([name for name in names(tmp_path) if name.startswith("states/") and name.count("/") == 2]) == 4


def test_what_a_killed_process_left_is_collected(tmp_path):
    """When it is old enough; not before, since its process may be alive."""
    with ZarrStreamer(tmp_path) as streamer:
        version = commit(streamer, 1)
    before = names(tmp_path)
    with ZarrStreamer(tmp_path, segment_bytes=PAGE_BYTES) as killed:
        killed.append(numbers(2), pages_of(numbers(2))).wait()
    (tmp_path / "manifests/000000000002.77.partial").write_bytes(b"half")
    assert len(names(tmp_path)) == len(before) + 3
    with ZarrStreamer(tmp_path) as streamer:
        assert streamer.collect() == 0
    for name in names(tmp_path) - before:
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    with ZarrStreamer(tmp_path) as streamer:
        assert streamer.collect() == 3
        assert names(tmp_path) == before
        check_pages(streamer, version, 1)


def test_what_is_not_yet_committed_is_not_collected(tmp_path):
    """Pages that were appended before others' commits are there for the next one."""
    with ZarrStreamer(tmp_path, keep_versions=1, grace_s=0, segment_bytes=PAGE_BYTES) as streamer:
        commit(streamer, 1)
        streamer.append(numbers(2), pages_of(numbers(2))).wait()
        streamer.collect()
        check_pages(streamer, commit(streamer, 3, before=(2,)), 3, 2)


def test_nothing_is_collected_while_a_version_is_damaged(tmp_path):
    """What it needs is not known. Commits go on, and waste waits."""
    with ZarrStreamer(tmp_path, keep_versions=2) as streamer:
        commit(streamer, 1)
        commit(streamer, 2)
        (tmp_path / "manifests/000000000002").write_bytes(b"")
        assert commit(streamer, 3) == Version(3)
        assert streamer.versions() == [Version(1), Version(2), Version(3)]
        with pytest.raises(pikv.DamagedError, match="the manifest of version 2 is damaged"):
            streamer.collect()


def test_at_least_one_version_is_kept(tmp_path):
    """Zero is refused."""
    with pytest.raises(pikv.ConfigError, match="keep_versions must be at least 1"):
        ZarrStreamer(tmp_path, keep_versions=0)


# --- faults


@pytest.mark.parametrize("call", ["pwrite", "fsync", "link", "open"])
def test_a_disk_that_fails_loses_nothing(tmp_path, monkeypatch, call):
    """StoreError, an OSError; older versions are there, and once the disk is well the same commit succeeds."""
    with ZarrStreamer(tmp_path) as streamer:
        first = commit(streamer, 1, 2)

        def fail(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(pikv.StoreError, match=r"No space left on device.*what was committed before is unchang"):
                commit(streamer, 3, before=(1, 2))
        assert streamer.versions() == [first]
        check_pages(streamer, first, 1, 2)
        fresh = numbers(3)[~streamer.holds(numbers(3))]
        assert len(fresh) == (call != "link")
        second = commit(streamer, *fresh.tolist(), before=(1, 2) if len(fresh) else (1, 2, 3))
        check_pages(streamer, second, 1, 2, 3)
        streamer.check(second)


def test_a_store_that_disappears_is_said(tmp_path):
    """StoreError for what needs it; opening it makes a new one."""
    with ZarrStreamer(tmp_path / "store") as streamer:
        commit(streamer, 1)
        (tmp_path / "store").rename(tmp_path / "elsewhere")
        with pytest.raises(pikv.VersionError, match="no version 1, it has: none"):
            streamer.manifest(Version(1))
        (tmp_path / "elsewhere").rename(tmp_path / "store")
        check_pages(streamer, Version(1), 1)


def test_a_file_in_place_of_the_folder_is_said(tmp_path):
    """StoreError."""
    (tmp_path / "store").write_text("no folder")
    with pytest.raises(pikv.StoreError, match=r"opening .* failed"):
        ZarrStreamer(tmp_path / "store")


# --- what is done in which order


def test_nothing_is_referred_to_before_it_is_durable(tmp_path, monkeypatch):
    """Every file, and every folder with a new name in it, is synced before the document gets its name."""
    calls, opened = [], {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "link", "pwrite")}

    def recorded_open(path, flags, *more):
        file = real["open"](path, flags, *more)
        opened[file] = os.path.relpath(path, tmp_path)
        if flags & os.O_CREAT:
            calls.append(("make", opened[file]))
        return file

    monkeypatch.setattr(os, "open", recorded_open)
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(("sync", opened[file])), real["fsync"](file))[1])
    monkeypatch.setattr(
        os, "pwrite", lambda file, *more: (calls.append(("write", opened[file])), real["pwrite"](file, *more))[1]
    )
    monkeypatch.setattr(
        os, "link", lambda a, b: (calls.append(("name", os.path.relpath(b, tmp_path))), real["link"](a, b))[1]
    )
    with ZarrStreamer(tmp_path) as streamer:
        calls.clear()
        commit(streamer, 1)
    named = calls.index(("name", "manifests/000000000001"))
    for at, (what, path) in enumerate(calls[:named]):
        if what in ("make", "write"):
            assert ("sync", path) in calls[at:named], f"{path} is not synced"
        if what == "make" and not path.endswith(".partial"):
            assert ("sync", str(Path(path).parent)) in calls[at:named], f"the name of {path} is not synced"
    assert ("sync", "manifests") in calls[named:]
    pages = [at for at, (what, path) in enumerate(calls) if what == "write" and path.startswith("segments")]
    states = [at for at, (what, path) in enumerate(calls) if what == "write" and path.startswith("states")]
    assert max(pages) < min(states) < max(states) < named


def test_a_name_is_given_once(tmp_path):
    """FileExistsError; what was there stays, and nothing partial is left."""
    folder = Folder(tmp_path)
    folder.create("a", b"first")
    with pytest.raises(FileExistsError):
        folder.create("a", b"second")
    assert folder.read("a") == b"first"
    assert names(tmp_path) == {"a"}
