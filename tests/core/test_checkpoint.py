"""Commit and restore: a restored cache goes on bit for bit, or says what is lost."""

from __future__ import annotations

import re

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore

import pikv
from pikv.adapters.compressors import Axes, Int4, LowRank, Rotated, UnrotatedLowRank
from pikv.adapters.zarr_store import ZarrStreamer
from pikv.core import states
from pikv.core.basis import Basis
from pikv.core.checkpoint import beside
from pikv.core.components import described
from pikv.core.exact import Exact
from pikv.core.layer import LayerCache
from pikv.core.query_window import QueryWindow
from pikv.core.tables import PageTable
from pikv.core.tail import Tail
from pikv.policies import EvictOldest, HeavyHitters, Importance, Quest, Recent, SnapKV, Uniform
from pikv.testing import strategies as some

SHAPE = {"kv_heads": 2, "key_dim": 16, "value_dim": 8, "rotary": pikv.Rotary.of(dim=16)}
MODEL = pikv.ModelConfig.of(
    [
        pikv.LayerConfig(query_heads=4, **SHAPE),
        pikv.LayerConfig(query_heads=2, window=40, **SHAPE),
        pikv.LayerConfig(query_heads=4, sinks=(0.0, 1.0, 2.0, 3.0), **SHAPE),
    ]
)
AXES = Axes(torch.linalg.qr(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(9))).Q)
PARTS = {
    "plain": {},
    "quest": {"page_selector": Quest(pages=2, dense_layers=0)},
    "int4": {"compressor": Int4()},
    "rotated": {"compressor": Rotated(Int4()), "page_selector": Quest(pages=2, dense_layers=0)},
    "low rank": {"compressor": LowRank(rank=4)},
    "low rank before rotation": {"compressor": UnrotatedLowRank(rank=4, outliers=1)},
    "calibrated": {"compressor": UnrotatedLowRank(rank=4, axes=AXES)},
    "h2o": {"token_selector": HeavyHitters(recent=8), "allocator": Uniform(), "budget_tokens": 64},
    "snapkv": {"token_selector": SnapKV(window=4), "allocator": Uniform(), "budget_tokens": 64},
    "importance": {
        "token_selector": Importance(recent=8),
        "allocator": Uniform(),
        "budget_tokens": 64,
        "page_selector": Quest(pages=2, dense_layers=1),
    },
    "full": {"when_full": EvictOldest()},
}


def runtime_of(store, **parts):
    return pikv.RuntimeConfig(page_size=16, tail_tokens=16, streamer=ZarrStreamer(store, segment_bytes=4096), **parts)


def reopened(runtime, store):
    """The runtime as another process would make it."""
    return attrs.evolve(runtime, streamer=ZarrStreamer(store, segment_bytes=4096))


def random(generator, batch, tokens, layer):
    heads = [(layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim), (layer.query_heads, layer.key_dim)]
    return [torch.randn(batch, n, tokens, dim, generator=generator) for n, dim in heads]


def step(caches, generator, start, tokens, *, batch=1, attends=True):
    """The same tokens to all caches; their answers."""
    answers = [[] for _ in caches]
    for layer_id, layer in enumerate(MODEL.layers):
        k, v, q = random(generator, batch, tokens, layer)
        for cache, own in zip(caches, answers, strict=True):
            cache.update(layer_id, start, k, v)
            own.append(cache.attend(layer_id, q) if attends else cache.retrieve(layer_id).keys)
    return answers


def check_goes_on_alike(cache, restored, generator, start, *, steps=20):
    """Every answer is the same, bit by bit, while both decode, seal and evict."""
    for position in range(start, start + steps):
        for one, other in zip(*step([cache, restored], generator, position, 1, batch=cache.sequences), strict=True):
            assert torch.equal(one, other)
    assert restored.stored_bytes().pages == cache.stored_bytes().pages


@pytest.mark.property
@given(
    parts=st.sampled_from(sorted(PARTS)),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    batch=st.integers(1, 2),
    settles=st.booleans(),
    generator=some.generators(),
)
def test_a_restored_cache_goes_on_bit_for_bit(parts, sizes, batch, settles, generator):
    """Of any composition, at any moment, whether or not what came last has been attended."""
    store = MemoryStore()
    cache, start = pikv.PiKVCache(MODEL, runtime_of(store, **PARTS[parts])), 0
    for size in sizes:
        step([cache], generator, start, size, batch=batch)
        start += size
    if not settles and not isinstance(cache.runtime.token_selector, SnapKV | Importance):
        step([cache], generator, start, 3, batch=batch, attends=False)
        start += 3
    version = cache.commit()
    restored = pikv.PiKVCache.restore(MODEL, reopened(cache.runtime, store))
    for layer_id in range(len(MODEL.layers)):
        for name in ("keys", "values", "positions", "mask"):
            one, other = (getattr(each.retrieve(layer_id), name) for each in (cache, restored))
            assert torch.equal(one, other)
    assert restored.sequences == batch
    check_goes_on_alike(cache, restored, generator, start)
    restored.pool.check_integrity()
    again = pikv.PiKVCache.restore(MODEL, reopened(cache.runtime, store), version)
    assert again.commit() == pikv.Version(version.number + 1)


def filled(store, tokens=200, *, batch=1, **parts):
    cache = pikv.PiKVCache(MODEL, runtime_of(store, **parts))
    step([cache], torch.Generator().manual_seed(0), 0, tokens, batch=batch)
    return cache


def test_only_new_pages_are_written(tmp_path):
    """A commit of a few more tokens adds what they take, in the restored cache too; forks share what is stored."""

    def segment_bytes():
        chunks = list((tmp_path / "segments").rglob("0.0"))
        return sum(path.stat().st_size for path in chunks)

    cache = filled(tmp_path)
    cache.commit()
    first = segment_bytes()
    assert first == cache.stored_bytes().pages
    cache.commit()
    fork = cache.fork()
    fork.commit()
    assert segment_bytes() == first
    restored = pikv.PiKVCache.restore(MODEL, reopened(cache.runtime, tmp_path))
    for position in range(200, 216):
        step([restored], torch.Generator().manual_seed(1), position, 1)
    restored.commit()
    strides = sum(layer.codec.form.stride * 2 for layer in restored._layers.values())
    assert segment_bytes() == first + strides


def test_pages_are_streamed_while_a_cache_decodes(tmp_path):
    """What was streamed is not written again by the commit; it is right though its pages have been released since."""
    cache, generator = filled(tmp_path), torch.Generator().manual_seed(6)
    cache.stream()
    for position in range(200, 232):
        step([cache], generator, position, 1)
        cache.stream()
    fork = cache.fork()
    cache.reset()
    cache.update(0, 0, *random(generator, 1, 100, MODEL.layers[0])[:2])  # rows are used again
    cache.finish_prefill()
    cache.reset()
    version = fork.commit()
    held = {int(name) for layer in fork._layers.values() for name in fork.pool.names(layer.table.held()).tolist()}
    manifest = fork.runtime.streamer.manifest(version)
    assert {int(key) for keys in manifest.pages.values() for key in keys.tolist()} == held
    fork.runtime.streamer.check(version)
    check_goes_on_alike(fork, pikv.PiKVCache.restore(MODEL, reopened(fork.runtime, tmp_path)), generator, 232)


def test_older_versions_are_restored_too():
    """And go on as they would have then."""
    store, generator = MemoryStore(), torch.Generator().manual_seed(2)
    cache = filled(store, 100)
    version, then = cache.commit(), cache.fork()
    step([cache], generator, 100, 64)
    cache.commit()
    check_goes_on_alike(then, pikv.PiKVCache.restore(MODEL, reopened(cache.runtime, store), version), generator, 100)


def test_an_empty_cache_can_be_committed():
    """It is empty when restored, and takes a prompt."""
    store = MemoryStore()
    cache = pikv.PiKVCache(MODEL, runtime_of(store))
    cache.commit()
    restored = pikv.PiKVCache.restore(MODEL, reopened(cache.runtime, store))
    assert restored.sequences == 0
    step([restored], torch.Generator().manual_seed(0), 0, 40)


def test_restored_into_a_shared_pool():
    """Beside the cache that was committed; the pool then holds both, and nothing is lost by dropping one."""
    store, generator = MemoryStore(), torch.Generator().manual_seed(3)
    cache = filled(store, batch=2)
    cache.reorder([1, 0, 1])  # pages that are held more than once
    cache.commit()
    restored = pikv.PiKVCache.restore(MODEL, cache.runtime, pool=cache.pool)
    assert cache.pool.used_bytes == 2 * cache.stored_bytes().pages
    check_goes_on_alike(cache, restored, generator, 200)
    cache.reset()
    restored.pool.check_integrity()
    restored.drop([0, 1, 2])
    assert restored.pool.used_bytes == 0


def test_a_pool_without_room_stays_as_it_was():
    """PoolFullError, and no page is held."""
    store = MemoryStore()
    cache = filled(store)
    cache.commit()
    runtime = reopened(cache.runtime, store)
    stride = runtime.form(MODEL, 0).stride
    pool = pikv.PagePool(MODEL, runtime, capacity_bytes=30 * stride)
    with pytest.raises(pikv.PoolFullError):
        pikv.PiKVCache.restore(MODEL, runtime, pool=pool)
    assert pool.used_bytes == 0
    pool.check_integrity()


def test_bfloat16_and_queries_are_kept():
    """The window of a query token selector, in half precision."""
    store, model = MemoryStore(), pikv.ModelConfig.of(MODEL.layers, dtype=torch.bfloat16)
    runtime = runtime_of(store, **PARTS["snapkv"])
    cache = pikv.PiKVCache(model, runtime)
    for layer_id, layer in enumerate(model.layers):
        k, v, q = (each.bfloat16() for each in random(torch.Generator().manual_seed(0), 1, 50, layer))
        cache.update(layer_id, 0, k, v)
        cache.attend(layer_id, q)
    cache.commit()
    restored = pikv.PiKVCache.restore(model, reopened(runtime, store))
    for layer_id, layer in cache._layers.items():
        other = restored._layers[layer_id]
        assert torch.equal(layer.newest_queries.queries, other.newest_queries.queries)
        assert torch.equal(layer.tail.keys[:, :, : layer.tail.width], other.tail.keys)


# --- what must be the same


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model", {"model": pikv.ModelConfig(layers=3, query_heads=4, kv_heads=2, head_dim=16)}),
        ("page_size", {"page_size": 32}),
        ("compressor", {"compressor": Int4()}),
        ("page_selector", {"page_selector": Quest(pages=3)}),
        ("when_full", {"when_full": EvictOldest()}),
        ("tail_tokens", {"tail_tokens": 32}),
        (
            "token_selector",
            {"token_selector": Recent(recent=16), "budget_tokens": 64, "allocator": Uniform()},
        ),
    ],
)
def test_another_composition_is_refused(name, change):
    """ConfigError, which names the component, what it was and what it is now; policies may differ where allowed."""
    store = MemoryStore()
    cache = filled(store)
    cache.commit()
    model = change.pop("model", MODEL)
    runtime = attrs.evolve(reopened(cache.runtime, store), **change)
    with pytest.raises(pikv.ConfigError, match=f"{name} must be what it was when the version was committed"):
        pikv.PiKVCache.restore(model, runtime)
    policies = {*change, "allocator"} - {"page_size", "compressor"}
    if name in policies:
        restored = pikv.PiKVCache.restore(model, runtime, may_differ=policies)
        step([restored], torch.Generator().manual_seed(5), 200, 20)
        restored.pool.check_integrity()
    else:
        with pytest.raises(pikv.ConfigError, match="may_differ must name policies"):
            pikv.PiKVCache.restore(model, runtime, may_differ=[name])


@pytest.mark.parametrize(
    "compressor", [Exact(), Rotated(Int4()), LowRank(rank=6), UnrotatedLowRank(rank=6, axes=AXES)], ids=repr
)
def test_another_page_selector_indexes_anew(compressor):
    """It chooses as if it had been there from the start, by keys as they are read back."""
    store, generator = MemoryStore(), torch.Generator().manual_seed(4)
    cache = filled(store, batch=2, compressor=compressor)
    cache.commit()
    quest = {"page_selector": Quest(pages=2)}
    restored = pikv.PiKVCache.restore(
        MODEL, attrs.evolve(reopened(cache.runtime, store), **quest), may_differ=["page_selector"]
    )
    check_goes_on_alike(filled(MemoryStore(), batch=2, compressor=compressor, **quest), restored, generator, 200)


def test_without_a_streamer_there_is_nothing_to_commit_to():
    """ConfigError, which says what to add."""
    cache = pikv.PiKVCache(MODEL)
    with pytest.raises(pikv.ConfigError, match="need a streamer"):
        cache.commit()
    with pytest.raises(pikv.ConfigError, match="need a streamer"):
        pikv.PiKVCache.restore(MODEL, cache.runtime)
    with pytest.raises(pikv.VersionError, match="no version yet"):
        pikv.PiKVCache.restore(MODEL, runtime_of(MemoryStore()))


def test_components_are_described_by_name_and_fields():
    """An own part that is no attrs class by its name alone, with its module."""

    class Own:
        pass

    said = described(Quest(pages=3))
    assert (said["name"], said["pages"]) == ("Quest", 3)
    assert said.keys() == {"name", *(field.name for field in attrs.fields(Quest))}
    assert described(Own())["name"].endswith("Own")
    assert described((torch.float16, None, torch.tensor([1.5]))) == ["torch.float16", None, [1.5]]


# --- everything is in the commit


@pytest.mark.parametrize("kind", [LayerCache, Tail, PageTable, QueryWindow, Basis])
def test_every_field_is_committed(kind):
    """A field of a new type must be taught to pikv.core.states: it is a tensor, a part there, or what JSON can say."""
    known = {
        "Tensor",
        "bool",
        "int",
        "Tensor | None",
        "Tail",
        "PageTable",
        "QueryWindow | None",
        "Attended | None",
        "Basis | None",
    }
    for field in attrs.fields(kind):
        if field.name not in states.GIVEN and field.init:
            assert str(field.type) in known, f"{kind.__name__}.{field.name}: {field.type}"


def test_all_that_a_layer_holds_is_committed():
    """Also an answer that waits for room, and the marks of the last update."""
    store = MemoryStore()
    runtime = runtime_of(store)
    pool = pikv.PagePool(MODEL, runtime, capacity_bytes=1 << 20)
    cache = pikv.PiKVCache(MODEL, runtime, pool=pool)
    step([cache], torch.Generator().manual_seed(0), 0, 20)
    k, v, q = random(torch.Generator().manual_seed(1), 1, 40, MODEL.layers[0])
    positions = torch.arange(20, 60)[None].masked_fill(torch.arange(40) < 3, -1)
    cache.update(0, positions, k, v)
    form = runtime.form(MODEL, 0)
    taken = pool.allocate(form, pool.free_pages(form))
    with pytest.raises(pikv.PoolFullError):
        cache.attend(0, q)
    cache.commit()
    restored = pikv.PiKVCache.restore(MODEL, reopened(runtime, store))
    one, other = cache._layers[0], restored._layers[0]
    assert torch.equal(other.answer, one.answer)
    assert (other.settled, other.asked, other.padded) == (one.settled, one.asked, one.padded) == (False, True, True)
    pool.release(form, taken)
    assert torch.equal(cache.attend(0, q), restored.attend(0, q))


# --- damage


@pytest.mark.parametrize("fault", ["flips", "truncates", "loses"])
def test_damage_is_named_and_what_is_whole_can_be_restored(tmp_path, fault):
    """DamagedError with the tokens that are lost and the newest version that is whole; nothing is held."""
    generator = torch.Generator().manual_seed(1)
    cache = filled(tmp_path, batch=2)
    first, then = cache.commit(), cache.fork()
    step([cache], torch.Generator().manual_seed(1), 200, 64, batch=2)
    second = cache.commit()
    layer = cache._layers[0]
    column = layer.table.width - 1
    page = bytes(layer.pool.slab(layer.codec.form)[int(layer.pool.rows(layer.table.ids[1, 0, column]))].tolist())
    (path,) = [path for path in (tmp_path / "segments").rglob("0.0") if page in path.read_bytes()]
    stored = path.read_bytes()
    at = stored.index(page)
    path.unlink()
    if fault != "loses":
        flipped = stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :]
        path.write_bytes(flipped if fault == "flips" else stored[: at + 100])
    runtime = reopened(cache.runtime, tmp_path)
    pool = pikv.PagePool(MODEL, runtime)
    with pytest.raises(pikv.DamagedError, match=re.escape(f"restore version={first!r}")) as raised:
        pikv.PiKVCache.restore(MODEL, runtime, pool=pool)
    error = raised.value
    assert error.newest_good == first
    newest = layer.table.newest[1, 0].tolist()
    spans = {(each.first, each.last) for each in error.lost if (each.layer_id, each.sequence) == (0, 1)}
    assert (newest[column - 1] + 1, newest[column]) in spans
    assert fault != "flips" or len(error.lost) == 1
    assert f"layer 0 lost tokens {newest[column - 1] + 1} to {newest[column]} of sequence 1" in str(error)
    assert pool.used_bytes == 0
    with pytest.raises(pikv.DamagedError):
        pikv.PiKVCache.restore(MODEL, runtime, second)
    restored = pikv.PiKVCache.restore(MODEL, runtime, error.newest_good, pool=pool)
    check_goes_on_alike(then, restored, generator, 200)


def test_where_nothing_is_whole(tmp_path):
    """The error says so; a manifest that is damaged says nothing of tokens."""
    cache = filled(tmp_path)
    cache.commit()
    (tmp_path / "manifests/000000000001").write_bytes(b"nothing")
    with pytest.raises(pikv.DamagedError, match=r"version 1 is damaged.*no version is undamaged") as raised:
        pikv.PiKVCache.restore(MODEL, reopened(cache.runtime, tmp_path))
    assert raised.value.lost == ()


def test_many_lost_tokens_are_counted_in_short(tmp_path):
    """The message names some of them, the error has all."""
    cache = filled(tmp_path, batch=2)
    cache.commit()
    for path in (tmp_path / "segments").rglob("0.0"):
        path.unlink()
    with pytest.raises(pikv.DamagedError, match=r"\.\.\.; no version") as raised:
        pikv.PiKVCache.restore(MODEL, reopened(cache.runtime, tmp_path))
    assert len(raised.value.lost) > 8
    assert len(raised.value.keys) > 0


def test_composed_by_name(tmp_path):
    """A streamer is a part like others, for compose and for files."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=8)
    runtime = pikv.runtime_from({"streamer": {"name": "zarr", "folder": str(tmp_path), "keep_versions": 1}}, model)
    pikv.PiKVCache(model, runtime).commit()
    assert pikv.compose(model, streamer=runtime.streamer).commit() == pikv.Version(2)
    assert runtime.streamer.versions() == [pikv.Version(2)]
    with pytest.raises(pikv.ConfigError, match="it takes folder, keep_versions"):
        pikv.runtime_from({"streamer": "zarr"}, model)


def test_what_is_kept_beside():
    """Is in the version under its name, and changes nothing of the cache."""
    store = MemoryStore()
    cache = filled(store)
    version = cache.commit(beside={"ids": torch.arange(3)})
    manifest = cache.runtime.streamer.manifest(version)
    assert torch.equal(manifest.states["beside.ids"], torch.arange(3))
    assert list(beside(manifest)) == ["ids"]
    check_goes_on_alike(
        cache, pikv.PiKVCache.restore(MODEL, reopened(cache.runtime, store)), torch.Generator().manual_seed(7), 200
    )
