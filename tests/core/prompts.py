"""Prompts that share prefixes, and caches that are given them: for tests of what is adopted."""

from __future__ import annotations

import attrs
import obstore
import torch

import pikv
from pikv.adapters.zarr_store import StoredPrefixes
from pikv.core.fetching import FetchAlways

PAGE, TAIL, VOCABULARY = 16, 20, 11
MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=32)
RUNTIME = pikv.RuntimeConfig(page_size=PAGE, tail_tokens=TAIL)
GENERATOR = torch.Generator().manual_seed(0)
STATES = torch.randn(3, 3, VOCABULARY, 4, 32, generator=GENERATOR)
DOCUMENT = torch.randint(0, VOCABULARY, (1, 100), generator=GENERATOR)


def feed(cache, ids, start=0, stop=None):
    """Update and attend with the tokens of ids [batch, tokens] from `start` on, one number or one a sequence.

    What a token gives depends on itself and its position alone, so that its bytes do not depend on how it came. Returns
    what attend answered in each layer: [layers, batch, heads, tokens, dim].
    """
    starts = torch.as_tensor(start).expand(len(ids))
    width = (ids.shape[1] if stop is None else stop) - int(starts.min())
    positions = torch.arange(width).expand(len(ids), -1) + int(starts.min())
    answers = []
    for layer_id in range(len(cache.model.layers)):
        turned = (0.1 * positions[0, :, None, None]).cos()
        k, v, q = (STATES[layer_id][:, ids[:, positions[0]]] * turned).transpose(2, 3)
        stored = positions.masked_fill(positions < starts[:, None], -1)
        cache.update(layer_id, stored, k[:, :2], v[:, :2])
        answers.append(cache.attend(layer_id, q))
    return torch.stack(answers)


def page_bytes(cache):
    """The bytes of all pages, layer by layer, in the order of the tables."""
    layers = cache._layers.values()
    return [cache.pool.bytes_of(layer.codec.form, layer.table.held()) for layer in layers]


def check_alike(one, other):
    """Both hold the same pages, bit for bit, and the same tails."""
    for mine, theirs in zip(page_bytes(one), page_bytes(other), strict=True):
        assert torch.equal(mine, theirs)
    for layer_id in one._layers:
        mine, theirs = one._layers[layer_id], other._layers[layer_id]
        assert torch.equal(mine.table.counts, theirs.table.counts)
        assert torch.equal(mine.tail.keys[:, :, : mine.tail.width], theirs.tail.keys[:, :, : theirs.tail.width])
        for name in ("first", "last", "seen"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))


def check_empty(pool, *caches):
    """Nothing is held when the caches are reset and the prefixes forgotten."""
    pool.check_integrity()
    for cache in caches:
        cache.reset()
    pool.check_integrity()
    pool.prefixes.clear()
    pool.check_integrity()
    assert pool.used_bytes == 0
    assert len(pool.prefixes) == 0


class Process:
    """A cache as another process would have it, on a store: its own pool and its own connection."""

    def __init__(self, objects, runtime=RUNTIME, model=MODEL, **pool):
        self.store = StoredPrefixes(objects, at_once=1)
        self.runtime = attrs.evolve(runtime, prefix_store=self.store, fetching=FetchAlways())
        self.pool = pikv.PagePool(model, self.runtime, **pool)
        self.model, self.caches = model, []

    def begin(self, ids=DOCUMENT, *, weights="any", **settings):
        """A new cache that begins with these tokens, and what it covers."""
        self.caches.append(pikv.PiKVCache(self.model, self.runtime, pool=self.pool))
        return self.caches[-1], self.caches[-1].begin(ids, weights=weights, **settings)

    def run(self, ids=DOCUMENT, *, chunks=(None,), **settings):
        """A cache that was given these tokens; they are written when this returns."""
        cache, covered = self.begin(ids, **settings)
        start = covered
        for stop in chunks:
            if stop is None or stop > int(start.min()):
                feed(cache, ids, start, stop)
                start = torch.full_like(covered, stop or 0)
        self.store.flush()
        return cache

    def end(self):
        """Nothing leaks."""
        self.store.close()
        check_empty(self.pool, *self.caches)


def names_in(objects):
    return [each["path"] for some in obstore.list(objects) for each in some]
