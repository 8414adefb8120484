"""The pool: free rows, memory that is taken as pages are written, and goes back when they are free."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.core.slab import DeviceSlab, FreeRuns, HostSlab
from pikv.policies import Recent, Uniform

STATM = Path("/proc/self/statm")
needs_statm = pytest.mark.skipif(not STATM.exists(), reason="no /proc/self/statm: resident memory is read from Linux")
MEBIBYTE = 2**20


def resident_bytes():
    """The main memory that this process takes right now."""
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


@pytest.mark.skipif(sys.platform != "linux", reason="not Linux: there a slab is ordinary memory")
def test_address_space_that_the_system_refuses():
    """ConfigError says how much was asked for, and what to do."""
    model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=4)
    with pytest.raises(
        pikv.ConfigError, match=r"the system refused \d+ bytes of address space.*smaller capacity_bytes"
    ):
        pikv.PagePool(model, pikv.RuntimeConfig(), capacity_bytes=2**60)


MODEL = pikv.ModelConfig(layers=4, query_heads=4, kv_heads=4, head_dim=64)


def filled(tokens, **settings):
    """A cache of this many tokens in each layer, 2 KiB each."""
    cache = pikv.PiKVCache(MODEL, pikv.RuntimeConfig(**settings))
    for layer_id in range(len(MODEL.layers)):
        cache.update(layer_id, 0, *torch.ones(2, 1, 4, tokens, 64))
        cache.attend(layer_id, torch.ones(1, 4, tokens, 64)[:, :, :, :]) if tokens < 512 else cache.finish_prefill()
    return cache


@needs_statm
@pytest.mark.parametrize("ways", ["reset", "forget", "drop", "crop"])
def test_pages_that_nobody_holds_go_back_to_the_system(ways):
    """At least nine tenths of their bytes, in whatever way the tokens are forgotten."""
    cache = filled(8192)
    cache.finish_prefill()
    pages = cache.stored_bytes().pages
    assert pages > 60 * MEBIBYTE
    before = resident_bytes()
    if ways == "reset":
        cache.reset()
    elif ways == "drop":
        cache.drop([0])
    elif ways == "crop":
        cache.crop(10)
    else:
        cache = None
    assert before - resident_bytes() >= 0.9 * pages


@needs_statm
def test_evicted_pages_go_back_to_the_system():
    """A cache that shrinks to its budget gives back nine tenths of what left."""
    selector = Recent(sinks=4)
    cache = filled(8192, token_selector=selector, allocator=Uniform(), budget_tokens=8192)
    pages = cache.stored_bytes().pages
    small = pikv.PiKVCache(
        MODEL,
        pikv.RuntimeConfig(token_selector=selector, allocator=Uniform(), budget_tokens=256),
        pool=cache.pool,
    )
    before = resident_bytes()
    cache, small = None, small
    assert before - resident_bytes() >= 0.9 * pages


def test_a_cache_that_nobody_holds_gives_its_pages_back():
    """Without a reset; what a fork holds stays."""
    pool_of = filled(300)
    pool, fork = pool_of.pool, pool_of.fork()
    held = pool.used_bytes
    del pool_of
    assert pool.used_bytes == held
    del fork
    assert pool.used_bytes == 0
    pool.check_integrity()
