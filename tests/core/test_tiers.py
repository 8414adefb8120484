"""Pools with tiers: pages go far and come back, and every answer is what it is where all pages stay near."""

from __future__ import annotations

import gc

import attrs
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from obstore.store import MemoryStore

import pikv
from pikv.adapters.file_store import FileTier
from pikv.adapters.zarr_store import ZarrStreamer
from pikv.core.host_tier import HostTier
from pikv.core.modelled_tier import ModelledTier
from pikv.core.ports import Demotion, PageUse
from pikv.core.tier_stack import TierStack
from pikv.policies import AsLastStep, AsThisLayer, EvictOldest, FurthestLayer, LeastOftenRead, LeastRecentlyRead, Quest
from pikv.testing import strategies as some
from pikv.testing.faulty_tier import FaultyTier

MODEL = pikv.ModelConfig.of(
    [pikv.LayerConfig(query_heads=4, kv_heads=2, key_dim=16, value_dim=8)] * 2
    + [pikv.LayerConfig(query_heads=2, kv_heads=2, key_dim=16, value_dim=16, window=60)]
    + [pikv.LayerConfig(query_heads=4, kv_heads=2, key_dim=16, value_dim=8)]
)
STRIDE = 16 * 24 * 4 + 64
DEMOTIONS = [LeastRecentlyRead(), LeastOftenRead(), FurthestLayer()]
PREDICTORS = [None, AsLastStep(), AsThisLayer()]


def host(pages=200):
    return HostTier(capacity_bytes=pages * 2 * STRIDE)


def runtime_of(*tiers, pages=2, **parts):
    return pikv.RuntimeConfig(
        page_size=16, tail_tokens=16, tiers=tiers, page_selector=Quest(pages=pages, dense_layers=0), **parts
    )


def near(runtime, pages=14):
    """A cache whose pool has near memory for so many pages."""
    return pikv.PiKVCache(MODEL, runtime, pool=pikv.PagePool(MODEL, runtime, capacity_bytes=pages * STRIDE))


def all_near(runtime):
    return pikv.PiKVCache(MODEL, attrs.evolve(runtime, tiers=(), predictor=None))


def step(caches, generator, start, tokens, batch=1):
    answers = [[] for _ in caches]
    for layer_id, layer in enumerate(MODEL.layers):
        k = torch.randn(batch, 2, tokens, layer.key_dim, generator=generator)
        v = torch.randn(batch, 2, tokens, layer.value_dim, generator=generator)
        q = torch.randn(batch, layer.query_heads, tokens, layer.key_dim, generator=generator)
        for cache, own in zip(caches, answers, strict=True):
            cache.update(layer_id, start, k, v)
            own.append(cache.attend(layer_id, q))
    return answers


def prompt(caches, generator, tokens=160):
    """In chunks of 20; answers are compared."""
    for start in range(0, tokens, 20):
        first, *others = step(caches, generator, start, 20)
        for other in others:
            check_same(first, other)


def check_same(one, other):
    for here, there in zip(one, other, strict=True):
        assert torch.equal(here, there)


def check_holds_the_same(cache, other):
    for layer_id in cache._layers:
        for name in ("keys", "values", "positions", "mask"):
            assert torch.equal(getattr(cache.retrieve(layer_id), name), getattr(other.retrieve(layer_id), name))


@pytest.mark.parametrize("demotion", DEMOTIONS, ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda part: type(part).__name__)
def test_answers_are_those_of_a_cache_that_is_all_near(demotion, predictor, tmp_path):
    """Bit for bit, with half of the pages far; all pages are accounted for at the end."""
    runtime = runtime_of(FileTier(tmp_path, capacity_bytes=400 * STRIDE), demotion=demotion, predictor=predictor)
    cache, plain, generator = near(runtime, 26), all_near(runtime), torch.Generator().manual_seed(0)
    prompt([cache, plain], generator)
    for position in range(160, 200):
        check_same(*step([cache, plain], generator, position, 1))
    check_holds_the_same(cache, plain)
    assert cache.pool.used_bytes == plain.pool.used_bytes > cache.pool.capacity_bytes
    near_use, (use,) = cache.pool.use().near, cache.pool.use().tiers
    assert use.name == "FileTier"
    assert use.pages_read > 0
    assert use.pages_written > 0
    assert near_use.hits > 0
    assert near_use.misses > 0
    assert (near_use.coming > 0) <= (predictor is not None)
    assert (use.hits, use.misses) >= (use.pages_read, 0)
    cache.pool.check_integrity()
    if predictor is not None:
        assert 0 < cache.foresight.hit_rate <= 1
        assert 0 < cache.foresight.precision <= 1
    cache.reset()
    cache.pool.check_integrity()
    assert cache.pool.used_bytes == 0
    assert cache.pool.near_free_bytes == cache.pool.capacity_bytes
    assert cache.pool.residency.leases() == 0


class FarAndNear(RuleBasedStateMachine):
    """Caches on a pool with tiers, beside caches on a pool that is all near; faults come and go."""

    @initialize(
        pages=st.integers(10, 40),
        demotion=st.sampled_from(DEMOTIONS),
        predictor=st.sampled_from(PREDICTORS),
        generator=some.generators(),
    )
    def start(self, pages, demotion, predictor, generator):
        self.generator = generator
        self.faulty = FaultyTier(HostTier(capacity_bytes=60 * STRIDE))
        self.tiers = [self.faulty, HostTier(capacity_bytes=200 * STRIDE)]
        runtime = runtime_of(*self.tiers, demotion=demotion, predictor=predictor)
        self.pool = pikv.PagePool(MODEL, runtime, capacity_bytes=pages * STRIDE)
        self.pairs = [(pikv.PiKVCache(MODEL, runtime, pool=self.pool), all_near(runtime), [0])]

    def pick(self, number):
        return self.pairs[number % len(self.pairs)]

    @rule(number=st.integers(0), tokens=st.sampled_from([1, 1, 1, 2, 17, 33]), times=st.integers(1, 3))
    def step(self, number, tokens, times):
        """The same answers, or an error of the tiers that changed nothing and passes with the fault."""
        cache, plain, at = self.pick(number)
        batch = cache.sequences or 1
        for _ in range(times):
            for layer_id, layer in enumerate(MODEL.layers):
                k = torch.randn(batch, 2, tokens, layer.key_dim, generator=self.generator)
                v = torch.randn(batch, 2, tokens, layer.value_dim, generator=self.generator)
                q = torch.randn(batch, layer.query_heads, tokens, layer.key_dim, generator=self.generator)
                self.until_done(lambda c, a=(layer_id, at[0], k, v): c.update(*a), cache, plain)
                self.until_done(lambda c, a=(layer_id, q): c.attend(*a), cache, plain)
            at[0] += tokens

    def until_done(self, operation, cache, plain):
        expected = operation(plain)
        try:
            got = operation(cache)
        except (pikv.TierError, pikv.PageLostError):
            assert self.faulty.fault is not None
            assert self.faulty.injected > 0
            self.faulty.fault = None
            got = operation(cache)
        except pikv.PoolFullError:
            self.stop = True  # a layer does not fit near: the caches have gone apart
            self.pairs.clear()
            self.pairs.append(self.fresh())
            return
        if expected is not None:
            assert torch.equal(got, expected)

    def fresh(self):
        runtime = runtime_of(*self.tiers)
        return pikv.PiKVCache(MODEL, runtime, pool=self.pool), all_near(runtime), [0]

    @rule(fault=st.sampled_from(["fails to write", "fails to read", "lies", "truncates", None]))
    def break_or_mend(self, fault):
        self.faulty.fault = fault

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(number=st.integers(0))
    def fork(self, number):
        cache, plain, at = self.pick(number)
        self.pairs.append((cache.fork(), plain.fork(), list(at)))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(number=st.integers(0))
    def forget(self, number):
        self.pairs.pop(number % len(self.pairs))

    @rule(number=st.integers(0))
    def reorder(self, number):
        cache, plain, _ = self.pick(number)
        if 0 < cache.sequences < 3:
            for each in (cache, plain):
                each.reorder([0, 0])

    @rule(number=st.integers(0))
    def reset(self, number):
        cache, plain, at = self.pick(number)
        cache.reset()
        plain.reset()
        at[0] = 0

    @invariant()
    def the_books_add_up(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        assert 0 <= self.pool.near_free_bytes <= self.pool.capacity_bytes
        in_flight = sum(len(coming.ids) for coming in self.pool.residency._coming)
        assert self.pool.residency.leases() == in_flight, "a page stayed in use after it was read"

    def teardown(self):
        """All that was put in is there; then no lease is left, and no page, near or far."""
        if not hasattr(self, "pool"):
            return
        self.faulty.fault = None
        for cache, plain, _ in self.pairs:
            check_holds_the_same(cache, plain)
            cache.reset()
        self.pairs.clear()
        gc.collect()  # an error's traceback may hold a forgotten cache in a cycle
        self.pool.check_integrity()
        assert self.pool.used_bytes == 0
        assert self.pool.near_free_bytes == self.pool.capacity_bytes
        assert self.pool.residency.leases() == 0
        for tier, worker in zip(self.tiers, self.pool.residency.stack._workers, strict=True):
            worker.close()
            tier.check_integrity()
            assert tier.used_bytes == 0
            tier.close()


TestFarAndNear = pytest.mark.property(FarAndNear.TestCase)
TestFarAndNear.settings = settings(stateful_step_count=15, max_examples=max(1, settings.default.max_examples // 3))


# --- what goes first


def use():
    fields = {"read_at": [3, 1, 2], "reads": [1, 9, 5], "layers": [0, 1, 2]}
    return PageUse(**{name: torch.tensor(values) for name, values in fields.items()}, now=0, layer_count=3)


@pytest.mark.parametrize(
    ("demotion", "order"),
    [(LeastRecentlyRead(), [1, 2, 0]), (LeastOftenRead(), [0, 2, 1]), (FurthestLayer(), [0, 2, 1])],
)
def test_the_coldest_page_is_known(demotion, order):
    """By when it was read, how often, or whose turn it is."""
    assert demotion.warmth(use()).argsort().tolist() == order
    assert isinstance(demotion, Demotion)


# --- faults


@pytest.mark.parametrize("predictor", [None, AsThisLayer()], ids=["no predictor", "predictor"])
@pytest.mark.parametrize("fault", ["lies", "truncates", "fails to read"])
def test_a_page_that_comes_back_wrong_is_an_error(fault, predictor):
    """Never another answer; with the fault gone, the same call succeeds."""
    faulty = FaultyTier(host())
    runtime = runtime_of(faulty, predictor=predictor)
    cache, plain, generator = near(runtime, 26), all_near(runtime), torch.Generator().manual_seed(0)
    prompt([cache, plain], generator)
    faulty.fault = fault
    kind = pikv.TierError if fault == "fails to read" else pikv.PageLostError
    layers = list(enumerate(MODEL.layers))
    failed = 0
    for layer_id, layer in layers:
        k, q = (torch.randn(1, n, 1, 16, generator=generator) for n in (2, layer.query_heads))
        v = torch.randn(1, 2, 1, layer.value_dim, generator=generator)
        for each in (cache, plain):
            each.update(layer_id, 160, k, v)
        try:
            got = cache.attend(layer_id, q)
        except kind:
            failed += 1
            faulty.fault = None
            got = cache.attend(layer_id, q)
            faulty.fault = fault
        assert torch.equal(got, plain.attend(layer_id, q))
    assert failed > 0
    assert cache.pool.residency.stack.use[0].failures >= failed
    cache.pool.check_integrity()


@pytest.mark.parametrize("fault", ["lies", "fails to read"])
def test_what_was_foreseen_in_vain_is_asked_for_again(fault):
    """An error of what was fetched ahead is not one of the answer: the page is fetched when it is needed."""
    faulty = FaultyTier(host())
    runtime = runtime_of(faulty, pages=4, predictor=AsThisLayer())
    cache, plain, generator = near(runtime, 20), all_near(runtime), torch.Generator().manual_seed(0)
    residency = cache.pool.residency
    foresee = residency.foresee

    def failing_ahead(*arguments):
        faulty.fault = fault
        foresee(*arguments)
        for coming in residency._coming:
            for arrival in coming.arrivals:
                arrival.settle()
        faulty.fault = None

    residency.foresee = failing_ahead
    for position in range(200):
        check_same(*step([cache, plain], generator, position, 1))
    assert residency.stack.use[0].failures > 0
    cache.pool.check_integrity()


def test_a_tier_that_cannot_be_written_to_is_passed_over():
    """The next one takes the pages; if none does, the error is the first one's, and the layer is as before."""
    faulty = FaultyTier(host())
    runtime = runtime_of(faulty, host())
    cache, plain, generator = near(runtime, 26), all_near(runtime), torch.Generator().manual_seed(0)
    faulty.fault = "fails to write"
    prompt([cache, plain], generator)
    first, second = cache.pool.residency.stack.use
    assert (first.pages_written, first.failures > 0, second.pages_written > 0) == (0, True, True)
    runtime = runtime_of(faulty)
    alone = near(runtime, 26)
    with pytest.raises(pikv.TierError, match="fails to write"):
        prompt([alone], generator)
    alone.pool.check_integrity()


def test_far_tiers_that_are_full_are_said():
    """PoolFullError before anything has changed; EvictOldest makes room instead."""
    runtime = runtime_of(HostTier(capacity_bytes=30 * STRIDE))
    cache, generator = near(runtime, 28), torch.Generator().manual_seed(0)
    with pytest.raises(pikv.PoolFullError, match="the capacity_bytes of all tiers"):
        prompt([cache], generator, 400)
    cache.pool.check_integrity()
    evicting = near(attrs.evolve(runtime, when_full=EvictOldest(), tiers=(HostTier(capacity_bytes=60 * STRIDE),)), 28)
    prompt([evicting], generator, 400)
    evicting.pool.check_integrity()


def test_a_layer_that_does_not_fit_near_is_said():
    """PoolFullError, which says what is in use and what would help."""
    runtime = runtime_of(host())
    cache, generator = near(runtime, 10), torch.Generator().manual_seed(0)
    with pytest.raises(pikv.PoolFullError, match=r"beside \d+ pages in use; raise it, compose a page_selector"):
        prompt([cache], generator, 400)
    cache.pool.check_integrity()


def test_tiers_must_hold_what_is_near():
    """ConfigError; also for a predictor that has nothing to fetch from."""
    with pytest.raises(pikv.ConfigError, match="tiers must have room for all that lies near"):
        near(runtime_of(HostTier(capacity_bytes=10 * STRIDE)))
    with pytest.raises(pikv.ConfigError, match="predictor needs tiers"):
        pikv.RuntimeConfig(predictor=AsLastStep(), page_selector=Quest(pages=2))


# --- pins


def is_near(cache, layer_id):
    """Which pages of a layer lie near: bool [sequences, kv_heads, pages]."""
    table = cache._layers[layer_id].table
    return cache.pool.rows(table.ids[..., : table.width]) >= 0


def test_a_pinned_layer_stays_near():
    """With the pages to come, until it is unpinned; the others go far in its stead, and answers are the same."""
    runtime = runtime_of(host(), pages=2)
    cache, plain, generator = near(runtime, 48), all_near(runtime), torch.Generator().manual_seed(0)
    prompt([cache, plain], generator, 120)
    cache.pin(1)
    for position in range(120, 200):
        check_same(*step([cache, plain], generator, position, 1))
        assert bool(is_near(cache, 1).all())
    assert not bool(is_near(cache, 0).all())
    assert cache.pool.residency.leases() == 0
    cache.unpin(1)
    cache.pin(0)
    for position in range(200, 240):
        check_same(*step([cache, plain], generator, position, 1))
    assert not bool(is_near(cache, 1).all())
    assert bool(is_near(cache, 0).all())
    cache.pool.check_integrity()


def test_pages_before_a_position_are_pinned():
    """Those of a prompt, say; what follows is not, and pages that take the ids of freed ones are not either."""
    runtime = runtime_of(host(), pages=2)
    cache, generator = near(runtime, 40), torch.Generator().manual_seed(0)
    prompt([cache], generator, 160)
    for layer_id in (0, 1):
        cache.pin(layer_id, before=64)
    for position in range(160, 200):
        step([cache], generator, position, 1)
    for layer_id in (0, 1):
        assert bool(is_near(cache, layer_id)[..., :4].all())
    assert not bool(is_near(cache, 1)[..., 4:].all())
    cache.reset()
    assert not cache.pool.residency.pinned_layers
    prompt([cache], generator, 300)
    assert not bool(is_near(cache, 0).all())
    cache.pool.check_integrity()


def test_more_than_fits_cannot_be_pinned():
    """PoolFullError, and the pages can go far as before; pins without tiers are refused."""
    runtime = runtime_of(host(), pages=2)
    cache, generator = near(runtime, 26), torch.Generator().manual_seed(0)
    prompt([cache], generator, 160)
    for position in range(160, 260):
        step([cache], generator, position, 1)
    cache.pin(0, before=160)
    with pytest.raises(pikv.PoolFullError, match="or pin less"):
        cache.pin(1)
    cache.unpin(0)
    cache.pin(1, before=160)
    with pytest.raises(pikv.InputError, match="before must be"):
        cache.pin(0, before=0)
    with pytest.raises(pikv.StateError, match="is empty"):
        near(runtime).pin(0)
    plain = all_near(runtime)
    step([plain], generator, 0, 1)
    for refused in (plain.pin, plain.unpin):
        with pytest.raises(pikv.ConfigError, match="pins need tiers"):
            refused(0)


# --- with others


def test_far_pages_are_committed_and_restored():
    """A cache is committed with its pages where they are, and restored near or far."""
    store, generator = MemoryStore(), torch.Generator().manual_seed(0)
    runtime = runtime_of(host(), streamer=ZarrStreamer(store))
    cache = near(runtime, 26)
    prompt([cache], generator)
    cache.commit()
    plain = pikv.PiKVCache.restore(MODEL, attrs.evolve(runtime, tiers=(), streamer=ZarrStreamer(store)))
    again = attrs.evolve(runtime, tiers=(host(),), streamer=ZarrStreamer(store))
    pool = pikv.PagePool(MODEL, again, capacity_bytes=26 * STRIDE)
    restored = pikv.PiKVCache.restore(MODEL, again, pool=pool)
    check_holds_the_same(cache, plain)
    for position in range(160, 180):
        one, two, three = step([cache, plain, restored], generator, position, 1)
        check_same(one, two)
        check_same(one, three)


def test_more_is_decoded_than_fits_near():
    """Layers whose pages do not fit near, as long as what is chosen does; what is foreseen waits where it does not."""
    runtime = runtime_of(host(), pages=4, predictor=AsThisLayer())
    cache, plain, generator = near(runtime, 14), all_near(runtime), torch.Generator().manual_seed(0)
    for position in range(260):
        check_same(*step([cache, plain], generator, position, 1))
    assert cache._layers[0].table.counts.sum() * STRIDE > cache.pool.capacity_bytes
    assert cache.pool.used_bytes > 4 * cache.pool.capacity_bytes


def test_hidden_and_exposed_waits_add_up():
    """What was begun ahead is hidden as far as nobody waited for it; without a predictor nothing is."""
    for predictor in (None, AsLastStep()):
        tier = ModelledTier(host(), latency_s=0.005, bytes_per_s=1e9)
        runtime = runtime_of(tier, predictor=predictor)
        cache, generator = near(runtime, 26), torch.Generator().manual_seed(0)
        prompt([cache], generator)
        before = cache.pool.use().tiers[0]
        for position in range(160, 190):
            step([cache], generator, position, 1)
        use = cache.pool.use().tiers[0]
        assert use.read_s - before.read_s >= 0.005
        assert use.foreseen_exposed_s + use.hidden_s >= use.foreseen_s - 1e-6
        assert use.write_s > 0
        assert (use.foreseen_s > 0) == (predictor is not None)
        assert use.hidden_s <= use.foreseen_s
        whole = cache.pool.use()
        assert (0 < whole.near.used <= whole.near.foreseen) == (predictor is not None)
        assert 0 <= whole.hidden_of_right <= 1
        assert use.foreseen_exposed_s <= use.exposed_s
        assert use.queued == 0


def test_what_has_gone_through_is_printed():
    """A line for each place; a pool without tiers has none but its bytes."""
    cache, generator = near(runtime_of(host(4), host()), 26), torch.Generator().manual_seed(0)
    prompt([cache], generator)
    step([cache], generator, 160, 1)
    held, near_line, first, second = str(cache.pool.use()).splitlines()
    assert "may lie near" in held
    assert "pages found" in near_line
    assert "pages written" in first
    assert "pages were elsewhere" in second
    first_use, second_use = cache.pool.use().tiers
    assert first_use.misses == second_use.hits > 0
    assert second_use.misses == 0
    assert len(str(all_near(cache.runtime).pool.use()).splitlines()) == 1
    with pytest.raises(pikv.ConfigError, match="foresight needs a predictor"):
        _ = cache.foresight


def test_tiers_that_are_too_small_for_a_page_are_said():
    """PoolFullError, though there are bytes enough in all of them together."""
    stack = TierStack([HostTier(capacity_bytes=100), HostTier(capacity_bytes=100)])
    stack.grow(1)
    with pytest.raises(pikv.PoolFullError, match="1 pages of 128 bytes must go far and no tier has room"):
        stack.write(torch.zeros(1, dtype=torch.int32), torch.zeros(1, 128, dtype=torch.uint8))


def test_composed_with_tiers():
    """Compose takes tiers and near_bytes, and a pool of that size."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=8)
    quest = {"page_selector": Quest(pages=2, dense_layers=0), "predictor": AsThisLayer()}  # one layer: none is next
    cache = pikv.compose(model, tiers=[HostTier(capacity_bytes=1 << 20)], near_bytes=1 << 16, page_size=16, **quest)
    for position in range(200):
        cache.update(0, position, *torch.randn(2, 1, 8))
        cache.attend(0, torch.randn(1, 2, 1, 8))
    with pytest.raises(pikv.ConfigError, match="near_bytes is for the pool that compose makes"):
        pikv.compose(model, pool=cache.pool, near_bytes=1 << 16)
    assert cache.pool.capacity_bytes == 1 << 16
    assert cache.pool.total_bytes == 1 << 20
