"""Prefixes: pages that the same tokens would have sealed are adopted, anything else is a miss, and nothing leaks."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prompts import DOCUMENT, GENERATOR, MODEL, PAGE, RUNTIME, TAIL, VOCABULARY, check_alike, check_empty, feed

import pikv
from pikv.adapters.compressors import Exact, Int8, LowRank, Rotated
from pikv.core.host_tier import HostTier
from pikv.core.ports.compressor import Compressor
from pikv.core.ports.transport import Solo
from pikv.policies import EvictOldest, KeyCodes, Quest, Recent, SnapKV, TokenRange, Uniform


class Unsaid(Compressor):
    """Exact pages of a class whose settings nobody can compare."""

    form, encode, decode = (getattr(Exact(), name) for name in ("form", "encode", "decode"))


def fresh(like, runtime=None, **settings):
    """A cache in the same pool, composed alike or otherwise."""
    runtime = attrs.evolve(runtime or like.runtime, **settings)
    return pikv.PiKVCache(like.model, runtime, pool=like.pool)


def with_document(runtime=RUNTIME, ids=DOCUMENT, *, chunks=(None,), **begin):
    """A cache that has begun with these tokens and been given them."""
    cache = pikv.PiKVCache(MODEL, runtime)
    assert cache.begin(ids, **begin).tolist() == [0] * len(ids)
    start = 0
    for stop in chunks:
        feed(cache, ids, start, stop)
        start = stop
    return cache


@pytest.mark.property
@given(
    shared=st.lists(st.integers(0, 100), min_size=1, max_size=3),
    total=st.integers(1, 100),
    chunk=st.integers(1, 100),
    compressor=st.sampled_from([Exact(), Int8()]),
    selector=st.sampled_from([None, Quest(pages=1, dense_layers=0), KeyCodes(pages=1)]),
)
def test_what_was_adopted_is_what_would_have_been_sealed(shared, total, chunk, compressor, selector):
    """Pages bit for bit and tails too, over prompts that share 0..n tokens each; exact answers are the same."""
    runtime = attrs.evolve(RUNTIME, compressor=compressor, page_selector=selector)
    exact = compressor == Exact() and selector is None
    donor = with_document(runtime, chunks=(chunk, None) if exact and chunk < 100 else (None,))
    prompts = DOCUMENT[:, :total].repeat(len(shared), 1)
    for prompt, common in zip(prompts, shared, strict=True):
        prompt[common:] = (prompt[common:] + 1) % VOCABULARY
    cache, without = fresh(donor), pikv.PiKVCache(MODEL, runtime)
    covered = cache.begin(prompts)
    expected = [min(common, max(0, total - TAIL), 80) // PAGE * PAGE for common in shared]
    assert covered.tolist() == expected
    start = int(covered.min())
    answers, plain = feed(cache, prompts, covered), feed(without, prompts)
    check_alike(cache, without)
    if exact:
        seen = torch.arange(start, total) >= covered[:, None]
        both = answers.transpose(2, 3)[:, seen], plain.transpose(2, 3)[:, :, start:][:, seen]
        torch.testing.assert_close(*both, atol=1e-5, rtol=0)
    more = torch.randint(0, VOCABULARY, (len(shared), total + 40), generator=GENERATOR)
    for position in range(total, total + 40):
        both = (feed(each, more, position, position + 1) for each in (cache, without))
        torch.testing.assert_close(*both, atol=1e-5, rtol=0)
    check_alike(cache, without)
    check_empty(cache.pool, donor, cache)


def test_a_suffix_reads_adopted_pages_as_they_decode():
    """With a loss, an adopted page is read as any sealed one: what a prompt in two parts with these pages answers."""
    donor = with_document(attrs.evolve(RUNTIME, compressor=Int8()))
    cache = fresh(donor)
    assert cache.begin(DOCUMENT).tolist() == [80]
    feed(cache, DOCUMENT, 80)
    torch.testing.assert_close(cache.retrieve(1).keys, donor.retrieve(1).keys, atol=0, rtol=0)
    again = fresh(donor)
    assert again.begin(DOCUMENT).tolist() == [80]  # what came after adopted pages has another lineage, and is no guess


@pytest.mark.parametrize(
    "other",
    [
        {"tail_tokens": TAIL - 1},
        {"page_selector": Quest(pages=1, dense_layers=0)},
        {"backends": (*RUNTIME.backends, *RUNTIME.backends)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_settings_miss(other):
    """Another composition finds nothing of what this one has sealed, though the pool serves both."""
    donor = with_document(attrs.evolve(RUNTIME, **other))
    assert fresh(donor).begin(DOCUMENT).tolist() == [80]
    assert fresh(donor, RUNTIME).begin(DOCUMENT).tolist() == [0]


def test_other_models_miss():
    """Another config, and other weights of the same config where they are named."""
    donor = with_document(weights="a")
    larger = pikv.ModelConfig(layers=3, query_heads=4, kv_heads=2, head_dim=32)
    assert pikv.PiKVCache(larger, RUNTIME, pool=donor.pool).begin(DOCUMENT, weights="a").tolist() == [0]
    assert fresh(donor).begin(DOCUMENT, weights="b").tolist() == [0]
    assert fresh(donor).begin(DOCUMENT).tolist() == [0]
    assert fresh(donor).begin(DOCUMENT, weights="a").tolist() == [80]


@pytest.mark.parametrize(("compressor", "selector"), [(Int8(), None), (Exact(), Quest(pages=1, dense_layers=0))])
def test_other_chunk_schedules_miss_where_they_matter(compressor, selector):
    """A page that was computed while earlier ones were read with a loss is another one than that of a whole prompt."""
    runtime = attrs.evolve(RUNTIME, compressor=compressor, page_selector=selector)
    donor = with_document(runtime, chunks=(40, 80, None))
    for chunk_tokens, covered in [(40, 80), (None, 32), (80, 32), (41, 32), (30, 16)]:
        cache = fresh(donor)
        assert cache.begin(DOCUMENT, chunk_tokens=chunk_tokens).tolist() == [covered], chunk_tokens
        cache.reset()
    check_empty(donor.pool, donor)


def test_the_tail_is_not_shared_and_the_last_token_is_computed():
    """However long the known prefix is, what a prompt of these tokens would not have sealed is not adopted."""
    donor = with_document()
    for tokens in range(1, 101):
        cache = fresh(donor)
        covered = int(cache.begin(DOCUMENT[:, :tokens]))
        assert covered == max(0, tokens - TAIL) // PAGE * PAGE < tokens
        assert cache.sequences == (covered > 0)


def test_padding_is_no_token():
    """Prompts of different lengths, padded on either side by a negative number."""
    donor, nothing = with_document(), torch.full((1, 50), -1)
    ids = torch.cat([torch.cat([nothing, DOCUMENT[:, :50]], 1), torch.cat([DOCUMENT[:, :50], nothing], 1), DOCUMENT])
    assert fresh(donor).begin(ids).tolist() == [16, 16, 80]
    assert fresh(donor).begin(nothing[:, :0]).tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"budget_tokens": 64, "token_selector": SnapKV(window=4), "allocator": Uniform()}, "budget_tokens=64"),
        ({"budget_tokens": 64, "token_selector": Recent(), "allocator": Uniform()}, "budget_tokens=64"),
        ({"when_full": EvictOldest()}, "EvictOldest lets pages"),
        ({"compressor": LowRank(rank=32)}, "LowRank: pages in a basis"),
        ({"compressor": Rotated(Int8())}, "Rotated: pages in a basis"),
        ({"transport": Solo(), "sharding": TokenRange(tokens=16)}, "several ranks"),
        ({"compressor": Unsaid()}, "Unsaid: settings"),
    ],
)
def test_what_depends_on_more_than_the_tokens_is_not_shared_and_says_so(settings, reason):
    """Begin covers nothing, the second time too, and the cache tells why."""
    cache = pikv.PiKVCache(MODEL, attrs.evolve(RUNTIME, **settings))
    assert reason in cache.why_unshared
    for each in (cache, fresh(cache)):
        assert each.begin(DOCUMENT).tolist() == [0]
        feed(each, DOCUMENT)
    assert len(cache.pool.prefixes) == 0


def test_formats_that_differ_by_layer():
    """A basis in one layer is enough to share nothing; a loss in one, for updates to matter."""
    mixed = attrs.evolve(RUNTIME, compressor=(Exact(), Int8()))
    donor = with_document(mixed, chunks=(60, None))
    assert [fresh(donor).begin(DOCUMENT, chunk_tokens=chunk).tolist() for chunk in (None, 60)] == [[48], [80]]
    assert (
        "LowRank" in pikv.PiKVCache(MODEL, attrs.evolve(RUNTIME, compressor=(Exact(), LowRank(rank=32)))).why_unshared
    )


def test_windows_are_not_shared():
    """A layer whose old pages leave names itself."""
    cache = pikv.PiKVCache(pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=32, window=30), RUNTIME)
    assert "layers [0, 1] have a sliding window" in cache.why_unshared
    assert pikv.PiKVCache(MODEL, RUNTIME).why_unshared is None


def test_bad_input():
    """Begin names what was expected and changes nothing."""
    cache = with_document()
    for ids, expected in [
        (DOCUMENT[0], "token_ids must be [batch, tokens]"),
        (DOCUMENT[:0], "at least one sequence"),
        (DOCUMENT.float(), "token_ids must be whole numbers, got torch.float32"),
        (DOCUMENT > 1, "torch.bool"),
    ]:
        with pytest.raises(pikv.InputError) as raised:
            fresh(cache).begin(ids)
        assert expected in str(raised.value)
    with pytest.raises(pikv.InputError, match="chunk_tokens must be a positive number"):
        fresh(cache).begin(DOCUMENT, chunk_tokens=0)
    with pytest.raises(pikv.StateError, match="begin comes before the first update"):
        cache.begin(DOCUMENT)
    other = fresh(cache)
    other.begin(DOCUMENT[:, :5])
    with pytest.raises(pikv.InputError, match="k must have batch = 1, the prompts that begin was given, got 2"):
        feed(other, DOCUMENT.repeat(2, 1))
    check_empty(cache.pool, cache, other)


def test_positions_that_jump_are_other_tokens():
    """A host that stores its tokens elsewhere than it announced makes nothing known."""
    cache = pikv.PiKVCache(MODEL, RUNTIME)
    cache.begin(DOCUMENT)
    feed(cache, DOCUMENT, start=3)
    assert len(cache.pool.prefixes) == 0


def test_tokens_after_a_crop_are_not_those_announced():
    """A page of which a token may be another one has no key."""
    cache = pikv.PiKVCache(MODEL, RUNTIME)
    cache.crop(0)
    cache.begin(DOCUMENT)
    cache.crop(0)
    feed(cache, DOCUMENT, 0, 50)
    cache.crop(40)
    feed(cache, (DOCUMENT + 1) % VOCABULARY, 40)
    assert fresh(cache).begin(DOCUMENT).tolist() == [32]
    cache.crop(10)
    assert fresh(cache).begin(DOCUMENT).tolist() == [32]  # the pages are as they were
    check_empty(cache.pool, cache)


def test_forks_reorders_and_joins_keep_what_is_known():
    """Each sequence goes on with its own lineage; a joined one without any makes nothing known."""
    ids = torch.cat([DOCUMENT, (DOCUMENT + 1) % VOCABULARY])
    cache = pikv.PiKVCache(MODEL, RUNTIME)
    cache.begin(ids)
    forked = cache.fork()  # before the first update too
    feed(cache, ids, 0, 40)
    cache.reorder([1, 0])
    other, plain, empty = fresh(cache), fresh(cache), fresh(cache)
    other.begin(ids[:1].flip(1))
    feed(other, ids[:1].flip(1), 0, 40)
    feed(plain, ids[:1], 0, 40)
    empty.join(plain)
    assert empty._lineage is None
    empty.join(other)
    cache.join(empty)
    everything = torch.cat([ids.flip(0), ids[:1], ids[:1].flip(1)])
    feed(cache, everything, 40)
    assert fresh(cache).begin(everything).tolist() == [80, 80, 80, 80]
    cache.drop([0, 1, 2])
    feed(forked, ids)
    check_alike(forked, forked.fork())
    check_empty(cache.pool, cache, forked, other, plain, empty)


def test_what_is_known_in_some_layers_only_is_not_adopted():
    """A prompt that stopped in the middle of a step leaves a page that nobody takes, until another completes it."""
    cache = pikv.PiKVCache(MODEL, RUNTIME)
    cache.begin(DOCUMENT)
    k = torch.zeros(1, 2, 100, 32)
    cache.update(0, 0, k, k)
    cache.attend(0, torch.zeros(1, 4, 100, 32))
    assert len(cache.pool.prefixes) == 5
    other = fresh(cache)
    assert other.begin(DOCUMENT).tolist() == [0]
    feed(other, DOCUMENT)
    assert fresh(cache).begin(DOCUMENT).tolist() == [80]
    check_empty(cache.pool, cache, other)


def small_pool(pages, **settings):
    """A pool with room for so many pages of all layers and heads."""
    runtime = attrs.evolve(RUNTIME, **settings)
    stride = runtime.form(MODEL, 0).stride
    return pikv.PagePool(MODEL, runtime, capacity_bytes=pages * 4 * stride), runtime


def run(pool, runtime, ids, *, shift=0):
    """A cache that begins with these tokens, gets them and is reset; what it had adopted."""
    cache, ids = pikv.PiKVCache(MODEL, runtime, pool=pool), (ids + shift) % VOCABULARY
    covered = int(cache.begin(ids))
    feed(cache, ids, covered)
    cache.reset()
    pool.check_integrity()
    return covered


def test_suffixes_leave_before_prefixes_and_the_longest_unused_first():
    """Room that is needed is taken from the ends of what has gone unused longest, and never from a cache."""
    pool, runtime = small_pool(10)
    assert run(pool, runtime, DOCUMENT) == 0
    assert run(pool, runtime, DOCUMENT, shift=1) == 0
    assert pool.used_bytes == pool.capacity_bytes
    assert run(pool, runtime, DOCUMENT[:, :68], shift=2) == 0  # 3 pages: from the end of the first document
    assert [run(pool, runtime, DOCUMENT[:, :tokens]) for tokens in (36, 52, 68)] == [16, 32, 32]
    assert run(pool, runtime, DOCUMENT[:, :100], shift=1) <= 80
    pool.prefixes.clear()
    assert pool.used_bytes == 0


def test_a_beginning_stays_as_long_as_a_text_goes_on_from_it():
    """Of two texts that begin alike the ends leave, one after the other, and then what both begin with."""
    pool, runtime = small_pool(10)
    other = torch.cat([DOCUMENT[:, :48], (DOCUMENT[:, 48:] + 1) % VOCABULARY], dim=1)
    assert run(pool, runtime, DOCUMENT) == 0
    assert run(pool, runtime, other) == 48
    page = 4 * runtime.form(MODEL, 0).stride
    assert len(pool.prefixes) == 7
    assert pool.prefixes.free(3 * page) == 3 * page
    assert run(pool, runtime, DOCUMENT) == 48
    pool.prefixes.clear()
    assert run(pool, runtime, DOCUMENT) == 0
    assert run(pool, runtime, other) == 48
    assert pool.prefixes.free(7 * page) == 7 * page
    assert len(pool.prefixes) == 0
    pool.check_integrity()


def test_what_a_cache_holds_stays():
    """Pages that a cache reads are not given up; a pool full of them refuses, as without an index."""
    pool, runtime = small_pool(6)
    cache = pikv.PiKVCache(MODEL, runtime, pool=pool)
    cache.begin(DOCUMENT)
    feed(cache, DOCUMENT)
    other = pikv.PiKVCache(MODEL, runtime, pool=pool)
    with pytest.raises(pikv.PoolFullError):
        feed(other, DOCUMENT)
    assert len(pool.prefixes) == 5
    check_empty(pool, cache, other)


def test_pages_whose_prefix_has_left_are_not_added():
    """What could not be found is not held."""
    cache = with_document(chunks=(60,))
    assert len(cache.pool.prefixes) == 2
    cache.pool.prefixes.clear()
    feed(cache, DOCUMENT, 60)
    assert len(cache.pool.prefixes) == 0
    check_empty(cache.pool, cache)


def test_an_allocation_takes_the_room_of_prefixes():
    """Whoever asks the pool itself for pages gets those that only the index holds."""
    pool, runtime = small_pool(5)
    run(pool, runtime, DOCUMENT)
    form = runtime.form(MODEL, 0)
    ids = pool.allocate(form, 7)
    assert len(pool.prefixes) == 3
    pool.release(form, ids)
    pool.prefixes.clear()
    pool.check_integrity()


def test_a_lost_reference_is_found():
    """check_integrity counts what the index holds."""
    cache = with_document()
    form, ids = cache._layers[0].codec.form, cache._layers[0].table.held()
    cache.pool.release(form, ids)
    cache.pool.check_integrity()  # the cache's references are its own affair
    cache.pool.release(form, ids)
    with pytest.raises(pikv.StateError, match="defect of PiKV"):
        cache.pool.check_integrity()


def test_prefixes_go_far_and_come_back():
    """Known pages may lie in a tier, and are fetched when they are read."""
    runtime = attrs.evolve(RUNTIME, tiers=(HostTier(capacity_bytes=1 << 22),))
    pool = pikv.PagePool(MODEL, runtime, capacity_bytes=12 * runtime.form(MODEL, 0).stride)
    plain = pikv.PiKVCache(MODEL, RUNTIME)
    expected = feed(plain, DOCUMENT)[..., 80:, :]
    assert run(pool, runtime, DOCUMENT) == 0
    cache = pikv.PiKVCache(MODEL, runtime, pool=pool)
    assert cache.begin(DOCUMENT).tolist() == [80]
    torch.testing.assert_close(feed(cache, DOCUMENT, 80), expected, atol=1e-5, rtol=0)
    check_empty(pool, cache)


def test_half_adopted_layers_are_let_go(monkeypatch):
    """Begin that raises holds nothing, and the cache can begin again."""
    donor = with_document()
    cache, pages = fresh(donor), donor.pool.prefixes.pages

    def fails(keys, layer_id):
        if layer_id:
            raise MemoryError("no memory")
        return pages(keys, layer_id)

    monkeypatch.setattr(donor.pool.prefixes, "pages", fails)
    with pytest.raises(MemoryError):
        cache.begin(DOCUMENT)
    monkeypatch.undo()
    assert cache.begin(DOCUMENT).tolist() == [80]
    check_empty(donor.pool, donor, cache)


def test_two_caches_that_compute_the_same_prefix_share_one():
    """The first to seal a page is shared; the other keeps its own, and both go on."""
    first = pikv.PiKVCache(MODEL, RUNTIME)
    second = fresh(first)
    for cache in (first, second):
        cache.begin(DOCUMENT)
    for cache in (first, second):
        feed(cache, DOCUMENT)
    third = fresh(first)
    assert third.begin(DOCUMENT).tolist() == [80]
    assert torch.equal(third._layers[1].table.held(), first._layers[1].table.held())
    first.reset()
    second.reset()
    check_empty(first.pool, third)
