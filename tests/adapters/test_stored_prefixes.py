"""Pages of prompts in a folder and in memory: the suite, faults, and what is deleted."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
import torch
from object_store import ObjectStorePrefixes
from obstore.store import MemoryStore

import pikv
from pikv.adapters.zarr_store import StoredPrefixes, ZarrStreamer
from pikv.testing.memory_tier import PAGE_BYTES, numbers, pages_of
from pikv.testing.prefix_store import PrefixStoreConformance, check_read, names_of, write


class TestFolder(PrefixStoreConformance):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory):
        self.root = tmp_path_factory.mktemp("store")

    def open(self):
        return StoredPrefixes(self.root)

    def objects(self):
        return {str(p.relative_to(self.root)): p.read_bytes() for p in sorted(self.root.rglob("*")) if p.is_file()}

    def put(self, name, states):
        path = self.root / name
        path.unlink(missing_ok=True)
        if states is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(states)


class TestMemory(ObjectStorePrefixes):
    @pytest.fixture(autouse=True)
    def memory(self):
        self.store = MemoryStore()


def test_damage_is_logged(tmp_path, caplog):
    """With the page and the store."""
    with StoredPrefixes(tmp_path) as store:
        write(store, 1)
        (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
        file.write_bytes(b"half")
        with caplog.at_level(logging.WARNING):
            check_read(store, [1], set())
        assert f"page {names_of([1])[0]} in {tmp_path} is damaged" in caplog.text


def test_a_write_that_fails_is_logged_and_said_once(tmp_path, caplog):
    """StoreError from the next flush; then the page can be written."""
    (tmp_path / "prefixes").write_text("a file where a folder must be")
    with StoredPrefixes(tmp_path) as store:
        store.write(names_of([1, 2]), pages_of(numbers(1, 2)))
        with pytest.raises(pikv.StoreError, match=r"could not be written to .* and 1 more"):
            store.flush()
        assert "whoever needs it computes it" in caplog.text
        (tmp_path / "prefixes").unlink()
        write(store, 1)
        check_read(store, [1, 2], {1})


def test_a_store_that_fails_says_so(tmp_path, monkeypatch):
    """StoreError from every question, with what the system says."""

    def fail(*_, **__):
        raise OSError("the network is down")

    with StoredPrefixes(tmp_path) as store:
        write(store, 1)
        for name in ("exists", "read_bytes"):
            monkeypatch.setattr(Path, name, fail)
        monkeypatch.setattr(os, "walk", fail)
        out = torch.zeros(1, PAGE_BYTES, dtype=torch.uint8)
        for operation in (
            lambda: store.contains(names_of([1])),
            lambda: store.read(names_of([1]), out),
            lambda: store.collect(older_than_s=0),
        ):
            with pytest.raises(pikv.StoreError, match="the network is down"):
                operation()


def test_old_pages_are_deleted(tmp_path):
    """With what a killed process left; what is younger stays."""
    with StoredPrefixes(tmp_path) as store:
        write(store, 1, 2)
        partial = next(path.parent for path in tmp_path.rglob("*.*") if path.is_file()) / "x.partial"
        partial.write_bytes(b"half")
        assert store.collect(older_than_s=3600) == 0
        for path in tmp_path.rglob("*"):
            os.utime(path, (time.time() - 7200,) * 2)
        write(store, 3)
        assert store.collect(older_than_s=3600) == 3
        assert not partial.exists()
        check_read(store, [1, 2, 3], {3})


def test_versions_and_prefixes_share_a_store(tmp_path):
    """Neither collects what is the other's."""
    with StoredPrefixes(tmp_path) as store, ZarrStreamer(tmp_path, keep_versions=1, grace_s=0) as streamer:
        write(store, 1)
        for key in (1, 2):
            streamer.append(numbers(key), pages_of(numbers(key)))
            version = streamer.commit(pikv.core.ports.Manifest(facts={}, states={}, pages={PAGE_BYTES: numbers(key)}))
        check_read(store, [1], {1})
        store.collect(older_than_s=0)
        streamer.check(version)


def test_what_cannot_be_opened_is_refused(tmp_path):
    """StoreError for a file, ConfigError for no threads."""
    (tmp_path / "file").touch()
    with pytest.raises(pikv.StoreError, match="give it a folder or an object store"):
        StoredPrefixes(tmp_path / "file")
    with pytest.raises(pikv.ConfigError, match="at_once must be at least 1, got 0"):
        StoredPrefixes(tmp_path, at_once=0)
