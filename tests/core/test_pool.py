"""The pool: free rows, memory that is taken as pages are written, and goes back when they are free."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.core.slab import DeviceSlab, FreeRuns, HostSlab, trim

STATM = Path("/proc/self/statm")
needs_statm = pytest.mark.skipif(
    not STATM.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="no /proc/self/statm and glibc: they tell what memory is taken",
)
MEBIBYTE = 2**20


def resident_bytes():
    """The main memory that this process takes right now, without what malloc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.property
@given(rows=st.integers(0, 40), data=st.data())
def test_free_rows_equal_a_set(rows, data):
    """Whatever is taken and given back: no row twice, none lost, runs as long as can be, one run where there is one."""
    free, plain, taken = FreeRuns.of(rows), set(range(rows)), []
    for _ in range(data.draw(st.integers(0, 20))):
        if taken and data.draw(st.booleans()):
            run = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
            cut = data.draw(st.integers(0, len(run) - 1))  # a run may go back in parts
            taken += [run[:cut]] if cut else []
            whole = free.give(run[cut:].start, run.stop)
            plain |= set(run[cut:])
            assert set(run[cut:]) <= set(whole) <= plain
        else:
            count = data.draw(st.integers(0, len(plain)))
            longest = max((stop - start for start, stop in zip(free.starts, free.stops, strict=True)), default=0)
            runs = free.take(count)
            assert len(runs) == 1 or count > longest or count == 0
            assert sum(len(run) for run in runs) == count
            assert all(set(run) <= plain for run in runs)
            plain -= {row for run in runs for row in run}
            taken += [run for run in runs if run]
        assert free.total == len(plain)
        assert {row for run in zip(free.starts, free.stops, strict=True) for row in range(*run)} == plain
        assert all(stop < start for stop, start in zip(free.stops, free.starts[1:], strict=False))


@needs_statm
def test_memory_is_taken_as_it_is_written():
    """A slab of 4 GiB takes nothing; rows take their own bytes, and give them back."""
    before = resident_bytes()
    slab = HostSlab(4096, MEBIBYTE)
    assert resident_bytes() - before < MEBIBYTE
    slab.tensor[1000:1064] = 1
    assert 64 * MEBIBYTE <= resident_bytes() - before < 70 * MEBIBYTE
    slab.give_back(1000 * MEBIBYTE, 1064 * MEBIBYTE)
    assert resident_bytes() - before < 6 * MEBIBYTE
    assert int(slab.tensor[1000].sum()) == 0


def test_memory_that_is_partly_in_use_is_kept():
    """Only whole memory pages of a free range go back."""
    slab = HostSlab(64, 1000)
    slab.tensor[:] = 1
    slab.give_back(1000, 40_000)
    assert int(slab.tensor[0].sum()) == 1000
    assert int(slab.tensor[40:].sum()) == 24_000


def test_a_slab_may_be_empty():
    """No rows, no memory."""
    assert HostSlab(0, 64).tensor.shape == (0, 64)


def test_where_the_system_takes_nothing_back(monkeypatch):
    """A slab is ordinary memory, and rows are kept."""
    monkeypatch.setattr("pikv.core.slab._LINUX", False)
    slab = HostSlab(8, 4096)
    slab.tensor[:] = 1
    slab.give_back(0, 8 * 4096)
    assert slab.tensor.shape == (8, 4096)
    assert int(slab.tensor.sum()) == 8 * 4096


def test_memory_of_a_device_is_taken_whole():
    """And kept: there is nothing to give back."""
    slab = DeviceSlab(4, 64, torch.device("meta"))
    slab.give_back(0, 64)
    assert slab.tensor.shape == (4, 64)
    assert slab.tensor.device.type == "meta"


def test_where_there_is_nothing_to_trim(monkeypatch):
    """Another system, or a C library without malloc_trim: trim does nothing."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    trim()
    monkeypatch.setattr("pikv.core.slab._LINUX", False)
    monkeypatch.delattr(ctypes, "CDLL")
    trim()


@pytest.mark.skipif(sys.platform != "linux", reason="not Linux: there a slab is ordinary memory")
def test_address_space_that_the_system_refuses():
    """ConfigError says how much was asked for, and what to do."""
    model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=4)
    with pytest.raises(
        pikv.ConfigError, match=r"the system refused \d+ bytes of address space.*smaller capacity_bytes"
    ):
        pikv.PagePool(model, pikv.RuntimeConfig(), capacity_bytes=2**60)


@pytest.fixture(scope="module", autouse=True)
def _code_is_loaded():
    """The first use of an operation takes memory for its code."""
    let_a_window_pass(filled(tokens=200, window=100))


def filled(*, tokens=4096, window=None):
    """A cache of 4 layers, sealed but for a short tail."""
    cache = pikv.PiKVCache(pikv.ModelConfig(layers=4, query_heads=4, kv_heads=4, head_dim=64, window=window))
    for layer_id in range(4):
        cache.update(layer_id, 0, *torch.ones(2, 1, 4, tokens, 64))
    cache.finish_prefill()
    return cache


def let_a_window_pass(cache):
    """One token, far ahead, and another that settles the layer; attention would take memory for itself."""
    for layer_id in range(4):
        for position in (100_000, 100_001):
            cache.update(layer_id, position, *torch.ones(2, 1, 4, 1, 64))


WAYS = {
    "reset": pikv.PiKVCache.reset,
    "drop": lambda cache: cache.drop([0]),
    "crop": lambda cache: cache.crop(0),
    "window": let_a_window_pass,
}


@needs_statm
@pytest.mark.parametrize("forget", WAYS.values(), ids=WAYS)
def test_pages_that_nobody_holds_go_back_to_the_system(forget):
    """At least nine tenths of their bytes, in whatever way the tokens are forgotten."""
    cache = filled(window=4000)
    pages = cache.stored_bytes().pages
    assert pages > 28 * MEBIBYTE
    before = resident_bytes()
    forget(cache)
    assert before - resident_bytes() >= 0.9 * pages


@needs_statm
def test_pages_that_a_fork_holds_stay():
    """What is shared goes back when the last cache that holds it is gone, without a reset."""
    cache = filled()
    pool, fork, pages = cache.pool, cache.fork(), cache.stored_bytes().pages
    assert pool.used_bytes == pages
    before = resident_bytes()
    del cache
    assert pool.used_bytes == pages
    assert abs(before - resident_bytes()) < 0.1 * pages
    del fork
    assert pool.used_bytes == 0
    assert before - resident_bytes() >= 0.9 * pages
    pool.check_integrity()
