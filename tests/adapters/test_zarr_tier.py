from __future__ import annotations

import errno
import os

import pytest
import torch
from obstore.store import MemoryStore

import pikv
from pikv.adapters.zarr_store import ZarrTier
from pikv.policies import Quest
from pikv.testing.memory_tier import PAGE_BYTES, MemoryTierConformance, check_read, numbers, pages_of


class TestFolder(MemoryTierConformance):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory):
        self.root = tmp_path_factory.mktemp("tier")

    def make(self, capacity_bytes):
        return ZarrTier(self.root, capacity_bytes=capacity_bytes)


class TestMemory(MemoryTierConformance):
    def make(self, capacity_bytes):
        return ZarrTier(MemoryStore(), capacity_bytes=capacity_bytes)


def chunks(folder):
    return sum(path.stat().st_size for path in folder.rglob("0.0"))


def test_arrays_go_when_half_of_their_pages_have(tmp_path):
    """The others are written anew, so that twice the pages held are stored at most; and none when it is closed."""
    with ZarrTier(tmp_path, capacity_bytes=20 * PAGE_BYTES) as tier:
        tier.write(torch.arange(10), pages_of(torch.arange(10)))
        tier.discard(torch.arange(5))
        assert chunks(tmp_path) == 10 * PAGE_BYTES
        tier.discard(numbers(5))
        assert chunks(tmp_path) == 4 * PAGE_BYTES == tier.used_bytes
        check_read(tier, numbers(9, 6, 8, 7))
        tier.check_integrity()
        tier.discard(torch.arange(10))
        assert chunks(tmp_path) == 0
        tier.write(numbers(1), pages_of(numbers(1)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("fault", ["flips", "loses"])
def test_a_page_that_was_changed_is_lost(tmp_path, fault):
    """PageLostError, which names it; also while an array shrinks, which then stays."""
    with ZarrTier(tmp_path, capacity_bytes=20 * PAGE_BYTES) as tier:
        tier.write(torch.arange(4), pages_of(torch.arange(4)))
        (path,) = tmp_path.rglob("0.0")
        stored = path.read_bytes()
        path.unlink()
        if fault == "flips":
            path.write_bytes(bytes([stored[0] ^ 1]) + stored[1:])
        with pytest.raises(pikv.PageLostError, match="key 0; look at the store"):
            tier.read(numbers(0, 1), torch.empty(2, PAGE_BYTES, dtype=torch.uint8))
        tier.discard(numbers(1, 2, 3))
        assert tier.contains(numbers(0, 1)).tolist() == [True, False]


def test_a_full_disk_is_said_and_nothing_has_happened(tmp_path, monkeypatch):
    """TierError; no page of the batch is held, and with room it goes on."""
    with ZarrTier(tmp_path, capacity_bytes=20 * PAGE_BYTES) as tier:
        with monkeypatch.context() as patch:

            def fail(*_):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "pwrite", fail)
            with pytest.raises(pikv.TierError, match="No space left on device"):
                tier.write(numbers(1), pages_of(numbers(1)))
        assert not tier.contains(numbers(1))
        tier.write(numbers(1), pages_of(numbers(1)))
        check_read(tier, numbers(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(pikv.TierError, match="cannot be used"):
        ZarrTier(tmp_path / "file", capacity_bytes=1)


def test_books_that_do_not_add_up_are_found(tmp_path):
    """StateError."""
    with ZarrTier(tmp_path, capacity_bytes=20 * PAGE_BYTES) as tier:
        tier.write(numbers(1, 2), pages_of(numbers(1, 2)))
        tier._places.pop(2)
        with pytest.raises(pikv.StateError, match="please report it"):
            tier.check_integrity()


def test_a_cache_larger_than_its_memory(tmp_path):
    """Its answers are those of one that is all near."""
    model = pikv.ModelConfig(layers=2, query_heads=2, kv_heads=1, head_dim=8)
    parts = {"page_size": 16, "tail_tokens": 16, "page_selector": Quest(pages=2, dense_layers=0)}
    far = pikv.compose(model, tiers=[ZarrTier(tmp_path, capacity_bytes=1 << 20)], near_bytes=6 * 1088, **parts)
    near = pikv.compose(model, **parts)
    for position in range(200):
        for layer_id in range(2):
            k, v = torch.randn(2, 1, 8)
            q = torch.randn(1, 2, 1, 8)
            for cache in (far, near):
                cache.update(layer_id, position, k, v)
            assert torch.equal(far.attend(layer_id, q), near.attend(layer_id, q))
    assert far.pool.used_bytes > far.pool.capacity_bytes
