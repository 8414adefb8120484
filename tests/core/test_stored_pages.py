"""Prefixes in a store: another process adopts what this one sealed, anything wrong is a miss, and nothing leaks."""

from __future__ import annotations

import logging

import attrs
import obstore
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore
from prompts import DOCUMENT, MODEL, PAGE, RUNTIME, TAIL, VOCABULARY, Process, check_alike, feed, names_in

import pikv
from pikv.adapters.compressors import Exact, Int8
from pikv.adapters.zarr_store import StoredPrefixes
from pikv.core.host_tier import HostTier
from pikv.policies import KeyCodes, Quest


@pytest.mark.property
@given(
    shared=st.lists(st.integers(0, 100), min_size=1, max_size=3),
    total=st.integers(1, 100),
    chunk=st.integers(1, 100),
    known=st.integers(0, 100),
    compressor=st.sampled_from([Exact(), Int8()]),
    selector=st.sampled_from([None, Quest(pages=1, dense_layers=0), KeyCodes(pages=1)]),
)
def test_what_another_process_sealed_is_adopted(shared, total, chunk, known, compressor, selector):
    """Bit for bit what this one would have sealed, over prompts that share 0..n tokens, some of it in memory."""
    objects, runtime = MemoryStore(), attrs.evolve(RUNTIME, compressor=compressor, page_selector=selector)
    exact = compressor == Exact() and selector is None
    writer, reader = Process(objects, runtime), Process(objects, runtime)
    if known and exact:  # with a loss, what is computed after adopted pages has a lineage of its own
        reader.run(DOCUMENT[:, :known])
    writer.run(chunks=(chunk, None) if exact and chunk < 100 else (None,))
    prompts = DOCUMENT[:, :total].repeat(len(shared), 1)
    for prompt, common in zip(prompts, shared, strict=True):
        prompt[common:] = (prompt[common:] + 1) % VOCABULARY
    cache, covered = reader.begin(prompts)
    assert covered.tolist() == [min(common, max(0, total - TAIL), 80) // PAGE * PAGE for common in shared]
    without = pikv.PiKVCache(MODEL, runtime)
    feed(without, prompts)
    feed(cache, prompts, covered)
    check_alike(cache, without)
    for process in (writer, reader):
        process.end()


def test_a_prefix_is_stored_once():
    """Whoever adopts it, or has computed it at the same time, writes no second copy."""
    objects = MemoryStore()
    one, other = Process(objects), Process(objects)
    first, _ = one.begin()
    second, _ = other.begin()
    for process, cache in ((one, first), (other, second)):
        feed(cache, DOCUMENT)
        process.store.flush()
    third = Process(objects)
    third.run()
    assert len(names_in(objects)) == 5 * 2  # pages and layers
    assert sum(len(obstore.get(objects, name).bytes()) for name in names_in(objects)) == 5 * 2 * (
        2 * RUNTIME.form(MODEL, 0).stride + 4
    )
    for process in (one, other, third):
        process.end()


@pytest.mark.parametrize(
    "other",
    [
        {"tail_tokens": TAIL - 1},
        {"page_selector": Quest(pages=1, dense_layers=0)},
        {"compressor": Int8()},
        {"page_size": 32},
        {"backends": (*RUNTIME.backends, *RUNTIME.backends)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_settings_miss(other):
    """A page of another composition is no guess."""
    objects = MemoryStore()
    writer, reader = Process(objects, attrs.evolve(RUNTIME, **other)), Process(objects)
    writer.run()
    assert reader.begin()[1].tolist() == [0]
    for process in (writer, reader):
        process.end()


def test_other_models_and_weights_miss():
    """The weights must be named, since other processes may have others."""
    objects = MemoryStore()
    writer, reader = Process(objects), Process(objects)
    deeper = Process(objects, model=pikv.ModelConfig(layers=3, query_heads=4, kv_heads=2, head_dim=32))
    writer.run(weights="a")
    assert reader.begin(weights="b")[1].tolist() == [0]
    assert deeper.begin(weights="a")[1].tolist() == [0]
    assert reader.begin(weights="a")[1].tolist() == [80]
    with pytest.raises(pikv.InputError, match="weights must name the model's weights"):
        reader.begin(weights="")
    for process in (writer, reader, deeper):
        process.end()


def test_chunk_schedules_matter_where_pages_are_read_with_a_loss():
    """As they do in memory."""
    objects, runtime = MemoryStore(), attrs.evolve(RUNTIME, compressor=Int8())
    writer = Process(objects, runtime)
    writer.run(chunks=(40, 80, None))
    for chunk_tokens, covered in [(40, 80), (None, 32), (41, 32), (30, 16)]:
        reader = Process(objects, runtime)
        assert reader.begin(chunk_tokens=chunk_tokens)[1].tolist() == [covered], chunk_tokens
        reader.end()
    writer.end()


@pytest.mark.parametrize("layer_id", [0, 1])
@pytest.mark.parametrize("damage", [None, b"half"])
def test_a_lost_or_damaged_page_is_a_miss(layer_id, damage, caplog):
    """What comes before it is adopted; it is computed, and written, again."""
    objects = MemoryStore()
    writer = Process(objects)
    cache = writer.run()
    key = cache._lineage.sequences[0].keys_of(3)[2].hex()
    (name,) = (name for name in names_in(objects) if name.endswith(f"{key}.{layer_id}"))
    if damage is None:
        obstore.delete(objects, name)
    else:
        obstore.put(objects, name, damage)
    reader = Process(objects)
    with caplog.at_level(logging.WARNING):
        assert reader.begin()[1].tolist() == [32]
    assert ("is damaged" in caplog.text) == (damage is not None and layer_id < 2)
    assert name not in names_in(objects)
    again = Process(objects)
    check_alike(again.run(), cache)
    assert len(names_in(objects)) == 10
    for process in (writer, reader, again):
        process.end()


def test_what_memory_has_up_to_a_lost_page_is_adopted():
    """Nothing of the store is needed then."""
    objects = MemoryStore()
    writer, reader = Process(objects), Process(objects)
    reader.run(DOCUMENT[:, :68])
    source = writer.run()
    key = source._lineage.sequences[0].keys_of(4)[3].hex()
    for name in names_in(objects):
        if name.endswith(f"{key}.0"):
            obstore.delete(objects, name)
    assert reader.begin()[1].tolist() == [48]
    for process in (writer, reader):
        process.end()


def test_a_store_that_fails_is_a_miss(caplog, monkeypatch):
    """Said by the log: the prompt is computed."""
    objects = MemoryStore()
    writer, reader = Process(objects), Process(objects)
    writer.run()

    def fail(*_):
        raise pikv.StoreError("the network is down")

    for name in ("contains", "read"):
        with monkeypatch.context() as patch:
            patch.setattr(reader.store.__class__, name, fail)
            assert reader.begin()[1].tolist() == [0]
    assert caplog.text.count("the network is down; what is not in memory is computed") == 2
    assert reader.begin()[1].tolist() == [80]
    for process in (writer, reader):
        process.end()


def test_a_closed_store_takes_nothing_and_the_cache_goes_on(caplog):
    """The log says that pages are not shared."""
    process = Process(MemoryStore())
    cache, _ = process.begin()
    process.store.close()
    feed(cache, DOCUMENT)
    assert "5 pages of layer 1 are not shared (StoredPrefixes: it is closed" in caplog.text
    process.end()


def test_what_does_not_fit_is_computed(caplog):
    """Stored pages never push out what caches hold."""
    objects = MemoryStore()
    writer = Process(objects)
    writer.run()
    page = 4 * RUNTIME.form(MODEL, 0).stride
    reader = Process(objects, capacity_bytes=7 * page)
    busy = reader.run((DOCUMENT + 1) % VOCABULARY)
    with caplog.at_level(logging.INFO):
        assert reader.begin()[1].tolist() == [0]
    assert "stored pages do not fit beside what is in use" in caplog.text
    busy.reset()
    assert reader.begin()[1].tolist() == [80]
    for process in (writer, reader):
        process.end()


def test_large_prefixes_come_in_parts(monkeypatch):
    """A few pages at a time, so that little lies beside the pool."""
    objects = MemoryStore()
    writer = Process(objects)
    writer.run()
    monkeypatch.setattr("pikv.core.stored_pages.AT_ONCE", 2 * 2 * RUNTIME.form(MODEL, 0).stride)
    reader = Process(objects)
    cache, covered = reader.begin()
    assert covered.tolist() == [80]
    feed(cache, DOCUMENT, 80)
    check_alike(cache, writer.caches[0])
    for process in (writer, reader):
        process.end()


def test_far_pages_are_written_and_stored_ones_may_go_far():
    """A pool with tiers shares what it has, wherever it lies."""
    objects, page = MemoryStore(), 4 * RUNTIME.form(MODEL, 0).stride
    with HostTier(capacity_bytes=20 * page) as tier:
        tiered = attrs.evolve(RUNTIME, tiers=(tier,))
        reader, writer = Process(objects, tiered, capacity_bytes=4 * page), Process(objects)
        writer.run()
        cache, covered = reader.begin()
        assert covered.tolist() == [80]
        feed(cache, DOCUMENT, 80)
        check_alike(cache, writer.caches[0])
        longer = torch.cat([DOCUMENT, DOCUMENT], dim=1)
        reader.run(longer)
        assert writer.begin(longer)[1].tolist() == [176]
        for process in (writer, reader):
            process.end()


def test_what_is_not_shared_is_not_written():
    """Where a page depends on more than the tokens, the store stays empty."""
    objects = MemoryStore()
    model = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=32, window=30)
    process = Process(objects, model=model)
    process.run()
    assert names_in(objects) == []
    process.end()


def test_it_composes_by_name(tmp_path):
    """With its folder; an object that is no store is refused."""
    runtime = pikv.runtime_from({"prefix_store": {"name": "stored", "folder": str(tmp_path)}}, MODEL)
    cache = pikv.compose(MODEL, prefix_store=runtime.prefix_store)
    assert isinstance(cache.runtime.prefix_store, StoredPrefixes)
    runtime.prefix_store.close()
    with pytest.raises(pikv.ConfigError, match="prefix_store must be a PrefixStore object"):
        pikv.RuntimeConfig(prefix_store=str(tmp_path))
