"""Caches on one pool against plain ones, through anything that a caller may do, errors included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pikv
from pikv.testing import strategies as some
from pikv.testing.plain import PlainCache, check_holds

MODEL = pikv.ModelConfig.of(
    [
        pikv.LayerConfig(query_heads=4, kv_heads=2, key_dim=8, value_dim=3),
        pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=5, value_dim=8, window=37, softcap=5.0, sinks=(0.5,)),
        pikv.LayerConfig(query_heads=3, kv_heads=1, key_dim=7, value_dim=5, values="key_prefix"),
    ]
)
MOST_CACHES = 3


class CachesOnOnePool(RuleBasedStateMachine):
    """Pairs of a cache and a plain one. A rule does the same to both, or shows that an error did nothing."""

    @initialize(runtime=some.runtime_configs(), pages=st.integers(4, 60), generator=some.generators())
    def start(self, runtime, pages, generator):
        self.runtime, self.generator = runtime, generator
        stride = runtime.form(MODEL, 0).stride
        self.pool = pikv.PagePool(MODEL, runtime, capacity_bytes=pages * stride)
        self.pairs = []
        self.another()

    def another(self):
        self.pairs.append((pikv.PiKVCache(MODEL, self.runtime, pool=self.pool), PlainCache(MODEL)))

    def pick(self, number):
        return self.pairs[number % len(self.pairs)]

    def random(self, layer_id, batch, tokens):
        layer = MODEL.layers[layer_id]
        heads = [(layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim), (layer.query_heads, layer.key_dim)]
        k, v, q = (torch.randn(batch, n, tokens, dim, generator=self.generator) for n, dim in heads)
        return k, v if layer.values == "stored" else k[..., : layer.value_dim], q

    # --- tokens

    @rule(number=st.integers(0), data=st.data(), read=st.sampled_from(["attend", "attend", "retrieve", "nothing"]))
    def step(self, number, data, read):
        """New tokens in every layer, read one way or another; where the pool is full, nothing has happened."""
        cache, plain = self.pick(number)
        batch = plain.sequences or data.draw(st.integers(1, 3))
        tokens = data.draw(st.integers(0, 70) | st.just(1))
        after = plain.last() if plain.sequences else None
        positions = data.draw(some.positions(batch, tokens, after=after))
        for layer_id in range(len(MODEL.layers)):
            k, v, q = self.random(layer_id, batch, tokens)
            before = state(cache)
            try:
                cache.update(layer_id, positions, k, v if MODEL.layers[layer_id].values == "stored" else None)
            except pikv.PoolFullError:
                check_state(cache, before)
                continue
            plain.update(layer_id, positions, k, v)
            if read == "attend":
                self.attend(cache, plain, layer_id, q, positions)
            elif read == "retrieve":
                check_holds(cache, plain)

    def attend(self, cache, plain, layer_id, q, positions):
        before = state(cache)
        try:
            output = cache.attend(layer_id, q)
        except pikv.PoolFullError:
            check_state(cache, before)
        else:
            expected = plain.attend(layer_id, q, positions)
            torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)

    @rule(number=st.integers(0))
    def finish_prefill(self, number):
        """What a window hides may go; where the pool is full, nothing happens at all."""
        cache, _ = self.pick(number)
        before = state(cache)
        try:
            cache.finish_prefill()
        except pikv.PoolFullError:
            check_state(cache, before)

    # --- sequences

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule()
    def open(self):
        self.another()

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(number=st.integers(0))
    def fork(self, number):
        cache, plain = self.pick(number)
        self.pairs.append((cache.fork(), plain.fork()))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(number=st.integers(0))
    def forget(self, number):
        """A cache that nobody holds any more gives its pages back."""
        self.pairs.pop(number % len(self.pairs))

    @rule(number=st.integers(0), data=st.data())
    def reorder(self, number, data):
        cache, plain = self.pick(number)
        if plain.sequences:
            ids = data.draw(st.lists(st.integers(0, plain.sequences - 1), max_size=4))
            cache.reorder(ids)
            plain.reorder(ids)

    @rule(number=st.integers(0), data=st.data())
    def drop(self, number, data):
        cache, plain = self.pick(number)
        ids = data.draw(st.lists(st.sampled_from(range(plain.sequences)))) if plain.sequences else []
        cache.drop(torch.tensor(ids) if ids else ids)
        plain.drop(ids)

    @rule(number=st.integers(0), other=st.integers(0))
    def join(self, number, other):
        """Also a cache with itself. Layers are settled first, so that bytes may differ where the pool is full."""
        (cache, plain), (theirs, their_plain) = self.pick(number), self.pick(other)
        if plain.sequences + their_plain.sequences > 4:
            return
        before = contents(cache), contents(theirs)
        if plain.rows and their_plain.rows and plain.rows.keys() != their_plain.rows.keys():
            with pytest.raises(pikv.StateError):
                cache.join(theirs)
            return
        try:
            cache.join(theirs)
        except pikv.PoolFullError:
            check_contents(cache, before[0])
            check_contents(theirs, before[1])
        else:
            plain.join(their_plain)

    @rule(number=st.integers(0), data=st.data())
    def crop(self, number, data):
        """Refused only where a window may have passed what would be seen again."""
        cache, plain = self.pick(number)
        ends = [
            data.draw(st.integers(0, 1 + max(0, last))) for last in (plain.last().tolist() if plain.sequences else [])
        ]
        before = state(cache)
        try:
            cache.crop(torch.tensor(ends, dtype=torch.int64))
        except pikv.StateError:
            windowed = zip(plain.rows[1], ends, strict=True)
            assert any(0 < end <= row.last and row.last + 1 >= MODEL.layers[1].window for row, end in windowed)
            check_state(cache, before)
        else:
            plain.crop(ends)

    @rule(number=st.integers(0))
    def reset(self, number):
        cache, plain = self.pick(number)
        cache.reset()
        plain.reset()

    # --- errors

    @rule(number=st.integers(0), layer_id=st.integers(0, 1), data=st.data())
    def wrong_tokens(self, number, layer_id, data):
        """A wrong shape, type, batch, layer or position is refused, and nothing has happened."""
        cache, plain = self.pick(number)
        batch = plain.sequences or 1
        k, v, _ = self.random(layer_id, batch, 2)
        position = 1 + (int(plain.last().max()) if plain.sequences else 0)
        wrong = {
            "dim": (layer_id, position, k[..., 1:], v),
            "values": (layer_id, position, k, v[:, :, :1]),
            "dtype": (layer_id, position, k.half(), v.half()),
            "nan": (layer_id, position, k * torch.nan, v),
            "batch": (layer_id, torch.full((batch, 1), position), k, v),
            "layer": (3, position, k, v),
        }
        if plain.sequences:
            wrong["sequences"] = (layer_id, position, torch.cat([k, k]), torch.cat([v, v]))
            if layer_id in plain.rows and max(row.last for row in plain.rows[layer_id]) >= 0:
                wrong["back"] = (layer_id, max(row.last for row in plain.rows[layer_id]), k, v)
        before = state(cache)
        with pytest.raises((pikv.InputError, pikv.LayerError)):
            cache.update(*wrong[data.draw(st.sampled_from(sorted(wrong)))])
        check_state(cache, before)

    @rule(number=st.integers(0), layer_id=st.integers(0, 1))
    def wrong_queries(self, number, layer_id):
        """Queries of another number than the last update's are refused, and nothing has happened."""
        cache, plain = self.pick(number)
        before = state(cache)
        with pytest.raises((pikv.InputError, pikv.StateError)):
            cache.attend(layer_id, self.random(layer_id, plain.sequences or 1, 71)[2])
        check_state(cache, before)

    # --- what always holds

    @invariant()
    def the_caches_hold_what_was_put_in(self):
        for cache, plain in self.pairs:
            check_holds(cache, plain)

    @invariant()
    def the_pool_is_whole(self):
        self.pool.check_integrity()
        held = [cache.stored_bytes().pages for cache, _ in self.pairs]
        assert max(held) <= self.pool.used_bytes <= min(sum(held), self.pool.capacity_bytes)

    def teardown(self):
        """All pages go back when all caches are reset."""
        for cache, _ in getattr(self, "pairs", []):
            cache.reset()
            assert cache.stored_bytes().total == 0
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            assert self.pool.used_bytes == 0


def contents(cache):
    """All that can be read."""
    return [cache.retrieve(layer_id) for layer_id in range(len(MODEL.layers)) if layer_id in layers_with_tokens(cache)]


def layers_with_tokens(cache):
    held = []
    for layer_id in range(len(MODEL.layers)):
        try:
            cache.retrieve(layer_id)
        except pikv.StateError:
            continue
        held.append(layer_id)
    return held


def state(cache):
    return contents(cache), cache.stored_bytes()


def check_contents(cache, before):
    for now, then in zip(contents(cache), before, strict=True):
        for name in ("keys", "values", "positions", "mask"):
            assert torch.equal(getattr(now, name), getattr(then, name))


def check_state(cache, before):
    check_contents(cache, before[0])
    assert cache.stored_bytes() == before[1]


TestCachesOnOnePool = pytest.mark.property(CachesOnOnePool.TestCase)
TestCachesOnOnePool.settings = settings(stateful_step_count=25)
