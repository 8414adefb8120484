"""A pool that is full: it refuses and changes nothing, or the oldest pages leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.policies import EvictOldest, Recent
from pikv.testing import strategies as some
from pikv.testing.plain import PlainCache, attend, check_holds

MODEL = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=2, head_dim=4)
TWO = pikv.ModelConfig(layers=2, query_heads=2, kv_heads=2, head_dim=4)
GENERATOR = torch.Generator().manual_seed(0)


def tokens(batch, count, *, start=0):
    k, v, q = torch.randn(3, batch, 2, count, 4, generator=GENERATOR)
    return torch.arange(start, start + count).expand(batch, -1), k, v, q


def compose(pages, *, model=MODEL, **settings):
    """A cache whose pool holds this many pages of 16 tokens; a tail of 16."""
    runtime = pikv.RuntimeConfig(page_size=16, tail_tokens=16, **settings)
    stride = runtime.form(model, 0).stride
    return pikv.PiKVCache(model, runtime, pool=pikv.PagePool(model, runtime, capacity_bytes=pages * stride))


def test_a_pool_may_be_exactly_full():
    """As many pages as it holds, and no fewer free than none."""
    cache, plain = compose(pages=4), PlainCache(MODEL)
    positions, k, v, q = tokens(1, 48)
    for each in (cache, plain):
        each.update(0, positions, k, v)
    cache.attend(0, q)
    assert cache.pool.used_bytes == cache.pool.capacity_bytes
    assert cache.pool.free_pages(cache.runtime.form(MODEL, 0)) == 0
    check_holds(cache, plain)


def test_a_full_pool_refuses_and_the_cache_is_as_before():
    """PoolFullError, a MemoryError, says how much is missing and what to do; with room, attend goes on."""
    cache, plain = compose(pages=4), PlainCache(MODEL)
    other = pikv.PiKVCache(MODEL, cache.runtime, pool=cache.pool)
    for each in (cache, other):
        each.update(0, 0, *tokens(1, 32)[1:3])
        each.attend(0, tokens(1, 32)[3])
    cache.reset()
    positions, k, v, q = tokens(1, 48)
    for each in (cache, plain):
        each.update(0, positions, k, v)
    before = cache.stored_bytes()
    with pytest.raises(pikv.PoolFullError) as raised:
        cache.attend(0, q)
    assert isinstance(raised.value, MemoryError)
    for part in ["layer 0 must seal 4 pages", "1152 bytes are missing in capacity_bytes=", "EvictOldest()", "Refuse"]:
        assert part in str(raised.value)
    check_holds(cache, plain)
    assert cache.stored_bytes() == before
    with pytest.raises(pikv.PoolFullError):
        cache.update(0, 48, k[:, :, :2], v[:, :, :2])  # the layer has to be settled first
    check_holds(cache, plain)
    other.reset()
    torch.testing.assert_close(cache.attend(0, q).double(), plain.attend(0, q, positions), atol=1e-5, rtol=0)
    cache.update(0, 48, k[:, :, :2], v[:, :, :2])
    cache.pool.check_integrity()


def test_the_pool_has_no_page_twice():
    """The pool itself refuses pages that it does not have, and takes none."""
    pool = compose(pages=4).pool
    form = pikv.RuntimeConfig(page_size=16).form(MODEL, 0)
    ids = pool.allocate(form, 3)
    with pytest.raises(pikv.PoolFullError, match=r"2 pages of \d+ bytes are needed and 1 are left of capacity_bytes="):
        pool.allocate(form, 2)
    pool.release(form, ids)
    pool.check_integrity()
    assert pool.used_bytes == 0


def test_integrity_is_checked():
    """A page that nobody holds but that is not free is found: StateError, a RuntimeError."""
    pool = compose(pages=4).pool
    form = pikv.RuntimeConfig(page_size=16).form(MODEL, 0)
    pool.allocate(form, 1)
    pool._references[0] = 0
    with pytest.raises(pikv.StateError, match="please report it"):
        pool.check_integrity()


@pytest.mark.property
@given(
    batch=st.integers(1, 3),
    pages=st.integers(2, 8),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    generator=some.generators(),
    first_pages=st.integers(0, 1),
)
def test_the_oldest_pages_leave(batch, pages, sizes, generator, first_pages):
    """Attention is over what stayed: the first pages and the newest tokens. No more leave than have to."""
    cache = compose(pages * 2 * batch, when_full=EvictOldest(first_pages=first_pages))
    plain, start = PlainCache(MODEL), 0
    for count in sizes:
        k, v, q = torch.randn(3, batch, 2, count, 4, generator=generator)
        positions = torch.arange(start, start + count).expand(batch, -1)
        cache.update(0, positions, k, v)
        plain.update(0, positions, k, v)
        held = cache.retrieve(0)
        expected = attend(MODEL.layers[0], q, positions, held.keys, held.values, held.positions.long())
        try:
            output = cache.attend(0, q)
        except pikv.PoolFullError:  # the chunk alone needs more pages than there are
            assert count > 16 * (pages - first_pages)
            return
        start += count
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
        kept = cache.retrieve(0).positions[0, 0].tolist()
        cache.pool.check_integrity()
        evicted = start - len(kept)
        kept_first = list(range(16 * first_pages)) if evicted else []
        assert kept == kept_first + list(range(evicted + len(kept_first), start))
        assert evicted == 0 or cache.pool.used_bytes == cache.pool.capacity_bytes


def test_the_oldest_of_several_sequences_leave_first():
    """A sequence of high positions keeps its pages while one of low positions has some to give."""
    cache = compose(pages=8, when_full=EvictOldest(first_pages=0))
    positions = torch.stack([torch.arange(48), torch.arange(1000, 1048)])
    _, k, v, q = tokens(2, 48)
    cache.update(0, positions, k, v)
    cache.attend(0, q)
    cache.update(0, torch.stack([torch.full((16,), -1), torch.arange(1048, 1064)]), *tokens(2, 16)[1:3])
    cache.attend(0, tokens(2, 16)[3])
    held = cache.retrieve(0)
    assert held.positions[0, 0][held.mask[0, 0]].tolist() == list(range(16, 48))
    assert held.positions[1, 0].tolist() == list(range(1000, 1064))


def test_pages_that_another_cache_holds_free_nothing():
    """If the oldest pages are shared with a fork, the pool stays full, and nothing changes."""
    cache, plain = compose(pages=4, when_full=EvictOldest(first_pages=0)), PlainCache(MODEL)
    positions, k, v, q = tokens(1, 48)
    for each in (cache, plain):
        each.update(0, positions, k, v)
    cache.attend(0, q)
    fork = cache.fork()
    positions, k, v, q = tokens(1, 16, start=48)
    for each in (cache, plain):
        each.update(0, positions, k, v)
    with pytest.raises(pikv.PoolFullError, match="EvictOldest"):
        cache.attend(0, q)
    check_holds(cache, plain)
    fork.reset()
    cache.attend(0, q)
    assert cache.retrieve(0).positions[0, 0].tolist() == list(range(16, 64))


def test_a_prompt_is_finished_in_all_layers_or_in_none():
    """Where a later layer finds the pool full, the earlier ones are as before too; with room it goes on."""
    cache = compose(
        pages=4, model=TWO, token_selector=Recent(sinks=0), allocator=pikv.policies.Uniform(), budget_tokens=32
    )
    for layer_id in range(2):
        _, k, v, q = tokens(1, 40)
        cache.update(layer_id, 0, k, v)
        cache.attend(layer_id, q)
    form = cache.runtime.form(TWO, 0)
    before, taken = cache.stored_bytes(), cache.pool.allocate(form, 1)  # of the four pages that are needed
    for _ in range(2):
        with pytest.raises(pikv.PoolFullError):
            cache.update(0, 40, *tokens(1, 1)[1:3])
        assert cache.stored_bytes() == before
    cache.pool.release(form, taken)
    cache.update(0, 40, *tokens(1, 1)[1:3])
    assert cache.stored_bytes().pages == 4 * form.stride
