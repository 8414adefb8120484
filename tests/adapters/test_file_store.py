from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pikv.adapters.file_store import FileTier
from pikv.core import files
from pikv.core.errors import TierError
from pikv.testing.memory_tier import PAGE_BYTES, MemoryTierConformance, check_read, numbers, pages_of


class TestFileTier(MemoryTierConformance):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory):
        self.folder = tmp_path_factory.mktemp("tier")

    def make(self, capacity_bytes):
        return FileTier(self.folder, capacity_bytes=capacity_bytes)


def test_nothing_is_left_in_the_folder(tmp_path):
    """Not even while the tier is open: however the process ends, its pages end with it."""
    with FileTier(tmp_path, capacity_bytes=4 * PAGE_BYTES) as tier:
        tier.write(numbers(1), pages_of(numbers(1)))
        assert list(tmp_path.iterdir()) == []


def test_files_are_closed(tmp_path):
    """As many are open afterwards as were before."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with FileTier(tmp_path, capacity_bytes=4 * PAGE_BYTES) as tier:
        tier.write(numbers(1), pages_of(numbers(1)))
        tier.write(numbers(2), pages_of(numbers(2), 64))
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 2
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    """When the tier is made, with what to do."""
    with pytest.raises(TierError, match="give it a folder that exists"):
        FileTier(tmp_path / "nowhere", capacity_bytes=1024)


def test_a_full_disk_is_said_and_nothing_has_happened(tmp_path, monkeypatch):
    """TierError, an OSError; no page of the batch is held, what was there is, and with room it goes on."""
    with FileTier(tmp_path, capacity_bytes=8 * PAGE_BYTES) as tier:
        tier.write(numbers(1, 2), pages_of(numbers(1, 2)))
        written = []

        def half(file, states, offset):
            if written:
                raise OSError(28, "No space left on device")
            written.append(1)
            return write(file, states[: len(states) // 2], offset)

        write = os.pwrite
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "pwrite", half)
            with pytest.raises(OSError, match=r"No space left on device.*make room"):
                tier.write(numbers(3, 4), pages_of(numbers(3, 4)))
        assert tier.contains(numbers(1, 2, 3, 4)).tolist() == [True, True, False, False]
        assert tier.used_bytes == 2 * PAGE_BYTES
        tier.write(numbers(3, 4), pages_of(numbers(3, 4)))
        check_read(tier, numbers(4, 1, 3, 2))
        tier.check_integrity()


def test_a_file_that_was_cut_is_found(tmp_path):
    """TierError, not zeros."""
    with FileTier(tmp_path, capacity_bytes=8 * PAGE_BYTES) as tier:
        tier.write(numbers(1, 2), pages_of(numbers(1, 2)))
        os.ftruncate(tier._files[PAGE_BYTES], 2 * PAGE_BYTES - 1)
        with pytest.raises(TierError, match="the file ends 1 bytes before"):
            tier.read(numbers(1, 2), torch.empty(2, PAGE_BYTES, dtype=torch.uint8))
        check_read(tier, numbers(1))
