"""Pages that another process is writing: a layer waits for its own and for no others, and says which do not come."""

from __future__ import annotations

import re
import threading
import time

import attrs
import obstore
import pytest
import torch
from obstore.store import MemoryStore
from prompts import DOCUMENT, MODEL, RUNTIME, STATES, VOCABULARY, Process, check_alike, feed, names_in

import pikv
from pikv.adapters.compressors import Int8
from pikv.adapters.zarr_store import StoredPrefixes
from pikv.core.host_tier import HostTier

LATE = (
    "prefixes: page 0 of 5 of layer 0, sequence 0 (tokens 0 to 15), has not come within 0 s; call again to wait on, or "
    "reset the cache and begin without wait_s, which adopts what is there, and compute the rest"
)


def feed_layer(cache, layer_id, start, stop=None, ids=DOCUMENT):
    """Give one layer these tokens."""
    positions = torch.arange(start, ids.shape[1] if stop is None else stop)
    k, v, q = (STATES[layer_id][:, ids[:, positions]] * (0.1 * positions[:, None, None]).cos()).transpose(2, 3)
    cache.update(layer_id, start, k[:, :2], v[:, :2])
    return cache.attend(layer_id, q)


def computed(runtime=RUNTIME, ids=DOCUMENT):
    """A cache that was given these tokens and knows of no others."""
    cache = pikv.PiKVCache(MODEL, runtime)
    feed(cache, ids)
    return cache


@pytest.fixture
def processes():
    """Makes processes on one store, and checks in the end that none leaks."""
    objects, made = MemoryStore(), []

    def make(*args, **settings):
        made.append(Process(objects, *args, **settings))
        return made[-1]

    make.objects = objects
    yield make
    for process in made:
        process.end()


def test_a_layer_waits_for_its_own_pages(processes):
    """The first layer answers when its pages are there, though the second has not begun."""
    writer, reader = processes(), processes()
    cache, covered = reader.begin(wait_s=0)
    assert covered.tolist() == [80]
    source, _ = writer.begin()
    feed_layer(source, 0, 0)
    writer.store.flush()
    answers = [feed_layer(cache, 0, 80)]
    with pytest.raises(pikv.WaitTimeoutError, match="page 0 of 5 of layer 1"):
        feed_layer(cache, 1, 80)
    feed_layer(source, 1, 0)
    writer.store.flush()
    answers.append(feed_layer(cache, 1, 80))
    alone = computed()
    check_alike(cache, alone)
    for layer_id, answer in enumerate(answers):
        expected = feed_layer(pikv.PiKVCache(MODEL, RUNTIME), layer_id, 0)
        torch.testing.assert_close(answer, expected[:, :, 80:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("runtime", [RUNTIME, attrs.evolve(RUNTIME, compressor=Int8())], ids=["exact", "int8"])
def test_a_reader_that_comes_too_early_waits(processes, runtime):
    """Whatever the writer's pace: it gets the pages that it would have sealed."""
    writer, reader = processes(runtime), processes(runtime)
    cache, _ = reader.begin(wait_s=60, chunk_tokens=40)

    def write():
        source, _ = writer.begin(chunk_tokens=40)
        for start, stop in ((0, 40), (40, 80), (80, None)):
            for layer_id in range(2):
                time.sleep(0.02)  # a model that computes: the reader finds nothing new meanwhile
                feed_layer(source, layer_id, start, stop)

    thread = threading.Thread(target=write)
    thread.start()
    feed(cache, DOCUMENT, 80)
    thread.join()
    alone = pikv.PiKVCache(MODEL, runtime)
    for start, stop in ((0, 40), (40, 80), (80, None)):
        feed(alone, DOCUMENT, start, stop)
    check_alike(cache, alone)


def test_what_has_come_of_later_layers_is_read_meanwhile(processes):
    """So that it is here when the layer that is waited for is complete."""
    writer, reader = processes(), processes()
    writer.run(DOCUMENT[:, :68])
    cache, _ = reader.begin(wait_s=0)
    for _ in range(3):
        with pytest.raises(pikv.WaitTimeoutError, match="page 3 of 5 of layer 0"):
            feed(cache, DOCUMENT, 80)
    assert len(reader.pool.prefixes) == 3
    assert reader.pool.used_bytes == 3 * 4 * RUNTIME.form(MODEL, 0).stride


def test_batches_wait_for_all_of_their_prompts(processes):
    """Which may be of different lengths, one known in memory and one not shared at all."""
    writer, reader = processes(), processes()
    ids = torch.cat([DOCUMENT, DOCUMENT, (DOCUMENT + 1) % VOCABULARY])
    ids[1, 60:] = -1
    ids[2, 15:] = -1
    reader.run(DOCUMENT[:, :50])
    cache, covered = reader.begin(ids, wait_s=0)
    assert covered.tolist() == [80, 32, 0]
    with pytest.raises(pikv.WaitTimeoutError, match="page 1 of 5 of layer 0, sequence 0"):
        cache.retrieve(0)
    writer.run()
    assert cache.retrieve(0).mask.sum(-1).tolist() == [[80, 80], [32, 32], [0, 0]]
    assert cache.retrieve(1).mask.sum(-1).tolist() == [[80, 80], [32, 32], [0, 0]]


def test_a_page_that_does_not_come_is_named_and_can_be_computed(processes, caplog):
    """The error says which, where and how long; a damaged page is logged besides. Nothing is changed by it."""
    writer, reader = processes(), processes()
    cache, _ = reader.begin(wait_s=0)
    with pytest.raises(pikv.WaitTimeoutError, match=re.escape(LATE)):
        feed(cache, DOCUMENT, 80)
    assert cache.sequences == 0
    source = writer.run()
    key = source._lineage.sequences[0].keys_of(4)[3].hex()
    (name,) = (name for name in names_in(processes.objects) if name.endswith(f"{key}.1"))
    obstore.put(processes.objects, name, b"half")
    with pytest.raises(pikv.WaitTimeoutError, match=r"page 3 of 5 of layer 1, .*\(tokens 48 to 63\)"):
        feed(cache, DOCUMENT, 80)
    assert f"{key}.1 in" in caplog.text
    cache.reset()
    assert cache.begin(DOCUMENT, weights="any").tolist() == [48]
    feed(cache, DOCUMENT, 48)
    check_alike(cache, source)


@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: cache.fork(),
        lambda cache: cache.reorder([0, 0]),
        lambda cache: cache.drop([]),
        lambda cache: cache.join(cache),
        lambda cache: cache.crop(80),
        lambda cache: cache.commit(),
        lambda cache: cache.stream(),
    ],
    ids=["fork", "reorder", "drop", "join", "crop", "commit", "stream"],
)
def test_what_needs_all_layers_waits_for_all(processes, operation, tmp_path):
    """And does what it does for a cache that holds them."""
    with pikv.runtime_from({"streamer": {"name": "zarr", "folder": str(tmp_path)}}, MODEL).streamer as streamer:
        writer, reader = processes(), processes(attrs.evolve(RUNTIME, streamer=streamer))
        cache, _ = reader.begin(wait_s=0)
        with pytest.raises(pikv.WaitTimeoutError):
            operation(cache)
        writer.run()
        result = operation(cache)
        for each in [cache, result] if isinstance(result, pikv.PiKVCache) else [cache]:
            assert each.retrieve(1).mask.sum(-1).unique().tolist() == [80]


def test_a_pool_without_room_refuses(processes):
    """PoolFullError from the update; with room it goes on."""
    page = 4 * RUNTIME.form(MODEL, 0).stride
    writer, reader = processes(), processes(capacity_bytes=6 * page)
    writer.run()
    busy = reader.run((DOCUMENT + 1) % VOCABULARY)
    cache, _ = reader.begin(wait_s=0)
    with pytest.raises(pikv.PoolFullError):
        feed(cache, DOCUMENT, 80)
    busy.reset()
    feed(cache, DOCUMENT, 80)
    check_alike(cache, writer.caches[0])


def test_pages_that_arrive_may_go_far(processes):
    """In a pool with tiers."""
    page = 4 * RUNTIME.form(MODEL, 0).stride
    with HostTier(capacity_bytes=20 * page) as tier:
        writer, reader = processes(), processes(attrs.evolve(RUNTIME, tiers=(tier,)), capacity_bytes=4 * page)
        writer.run()
        cache, _ = reader.begin(wait_s=0)
        feed(cache, DOCUMENT, 80)
        check_alike(cache, writer.caches[0])
        reader.end()


def test_a_promise_ends_with_a_reset(processes):
    """The cache is then as any empty one."""
    reader = processes()
    cache, _ = reader.begin(wait_s=0)
    cache.reset()
    feed(cache, DOCUMENT)
    check_alike(cache, computed())


def test_waiting_needs_a_store_and_a_time():
    """InputError says so."""
    with pytest.raises(pikv.InputError, match="wait_s is for pages that another process writes"):
        pikv.PiKVCache(MODEL, RUNTIME).begin(DOCUMENT, wait_s=1)
    with StoredPrefixes(MemoryStore()) as store:
        cache = pikv.compose(MODEL, prefix_store=store)
        for wait_s in (-1, float("nan")):
            with pytest.raises(pikv.InputError, match="wait_s must be seconds from 0 on"):
                cache.begin(DOCUMENT, weights="any", wait_s=wait_s)
