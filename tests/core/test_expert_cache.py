"""Shards by expert: any set of them answers as their union, and each is bounded by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pikv
from pikv.core.host_tier import HostTier
from pikv.core.ports.transport import Solo
from pikv.policies import (
    AsThisLayer,
    ChunkKV,
    ExpertGroups,
    HeavyHitters,
    KeyDiff,
    LatencyAware,
    Recent,
    TopK,
    Uniform,
)
from pikv.testing import plain
from pikv.testing import strategies as some
from pikv.testing.plain import rounding

EXPERTS = 6


def with_experts(layers) -> pikv.ModelConfig:
    """A float32 model of these layers."""
    return pikv.ModelConfig.of(layers, experts=EXPERTS, experts_per_token=2)


@pytest.mark.property
@given(
    layer=some.layer_configs(),
    runtime=some.runtime_configs(),
    shards=st.integers(1, 4),
    total=st.integers(1, 60),
    generator=some.generators(),
    data=st.data(),
)
def test_any_set_of_shards_answers_as_their_union(layer, runtime, shards, total, generator, data):
    """Beside what was updated last, which is seen before it has a shard; with padding, windows, sinks and softcaps."""
    model = with_experts([layer])
    heads = [(layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim), (layer.query_heads, layer.key_dim)]
    k, v, q = (torch.randn(2, n, total, dim, generator=generator) for n, dim in heads)
    probabilities = torch.rand(2, total, EXPERTS, generator=generator)
    positions, home = data.draw(some.positions(2, total)), probabilities.argmax(-1) % shards
    cache = pikv.ExpertKVCache(
        model,
        pikv.RuntimeConfig(page_size=runtime.page_size, tail_tokens=runtime.tail_tokens, router=TopK()),
        shards=shards,
    )
    for chunk in torch.arange(total).split(data.draw(some.chunkings(total, max_chunks=4))):
        if not len(chunk):
            continue
        chosen = data.draw(st.none() | st.sets(st.integers(0, shards - 1)))
        cache.update(0, positions[:, chunk], k[:, :, chunk], v[:, :, chunk])
        got = cache.attend(0, q[:, :, chunk], shards=chosen)
        wanted = torch.isin(home, torch.tensor(sorted(range(shards) if chosen is None else chosen)))
        seen = positions.masked_fill(~(wanted | torch.isin(torch.arange(total), chunk)), -1)
        until = slice(0, int(chunk[-1]) + 1)
        expected = plain.attend(
            layer, q[:, :, chunk], positions[:, chunk], k[:, :, until], v[:, :, until],
            seen[:, None, until].expand(-1, layer.kv_heads, -1),
        )  # fmt: skip
        torch.testing.assert_close(got.double(), expected, **rounding(torch.float32))
        cache.route(0, probabilities[:, chunk])


MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=8, experts=EXPERTS, experts_per_token=2)
EXACT = pikv.RuntimeConfig(page_size=16, tail_tokens=16, router=TopK())
BOUNDED = pikv.RuntimeConfig(
    page_size=16,
    tail_tokens=16,
    router=TopK(),
    token_selector=Recent(sinks=0, recent=16),
    allocator=Uniform(),
    budget_tokens=48,
)


def texts(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v, q and probabilities of two sequences."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 2, tokens, 8, generator=generator)
    return k, v, torch.cat([k, v], dim=1), torch.rand(2, tokens, EXPERTS, generator=generator)


def fill(cache: pikv.ExpertKVCache, tokens: int, prompt: int) -> Tensor:
    """A prompt and single tokens after it, through both layers; returns the shard of each token [2, tokens]."""
    k, v, q, probabilities = texts(tokens)
    for chunk in torch.arange(tokens).split([prompt, *[1] * (tokens - prompt)]):
        for layer_id in range(2):
            cache.update(layer_id, int(chunk[0]), k[:, :, chunk], v[:, :, chunk])
            cache.attend(layer_id, q[:, :, chunk])
            cache.route(layer_id, probabilities[:, chunk])
    return probabilities.argmax(-1) % cache.shards


def test_a_shard_keeps_its_newest_tokens():
    """As many as the budget, less than a page fewer, whatever the other shards hold; older ones free memory."""
    cache, whole = (pikv.ExpertKVCache(MODEL, runtime, shards=3) for runtime in (BOUNDED, EXACT))
    home = fill(cache, 400, prompt=150)
    fill(whole, 400, prompt=150)
    for shard in range(3):
        context = cache.retrieve(1, shard)
        for sequence in range(2):
            tokens = torch.nonzero(home[sequence] == shard).flatten()
            for positions in context.positions[sequence]:
                stored = positions[positions >= 0]
                assert 32 < len(stored) <= 48
                assert stored.tolist() == tokens[-len(stored) :].tolist()
            everything = whole.retrieve(1, shard).positions[sequence, 0]
            assert everything[everything >= 0].tolist() == tokens.tolist()
    assert cache.stored_bytes().total < whole.stored_bytes().total / 2


def test_a_bounded_cache_answers_from_what_it_keeps():
    """Tied to the definition of attention by what `retrieve` says is stored."""
    cache = pikv.ExpertKVCache(MODEL, BOUNDED, shards=2)
    fill(cache, 300, prompt=100)
    k, v, q, probabilities = texts(1)
    stored = [cache.retrieve(0, shard) for shard in (0, 1)]
    cache.update(0, 300, k, v)
    for shards in ([0], [1], [0, 1], []):
        parts = [stored[shard] for shard in shards]
        keys, values = (
            torch.cat([*(getattr(part, name) for part in parts), new], dim=2)
            for name, new in (("keys", k), ("values", v))
        )
        positions = torch.cat([*(part.positions for part in parts), torch.full((2, 2, 1), 300)], dim=2)
        expected = plain.attend(MODEL.layers[0], q, torch.full((2, 1), 300), keys, values, positions)
        torch.testing.assert_close(cache.attend(0, q, shards=shards).double(), expected, atol=1e-5, rtol=0)
    cache.route(0, probabilities)
    assert cache.attend(0, q).shape == q.shape


def test_low_bits_and_low_rank_pages_serve_shards():
    """A format is told of a row as of any other."""
    for names in ({"compressor": "int8"}, {"compressor": {"name": "low_rank", "rank": 8}}):
        runtime = pikv.runtime_from(names | {"router": "top_k", "page_size": 32, "tail_tokens": 16}, MODEL)
        cache, whole = pikv.ExpertKVCache(MODEL, runtime, shards=2), pikv.ExpertKVCache(MODEL, EXACT, shards=2)
        for each in (cache, whole):
            fill(each, 200, prompt=150)
            each.update(0, 200, *texts(1)[:2])
        q = texts(1)[2]
        torch.testing.assert_close(cache.attend(0, q), whole.attend(0, q), atol=0.1, rtol=0)
        assert cache.stored_bytes().pages


def test_the_order_of_calls_is_checked():
    """Update, attend, route; and a reset begins anew."""
    cache = pikv.ExpertKVCache(MODEL, EXACT, shards=2)
    k, v, q, probabilities = texts(20)
    with pytest.raises(pikv.StateError, match="layer 0 is empty"):
        cache.attend(0, q)
    assert cache.sequences == 0
    cache.update(0, 0, k, v)
    assert cache.sequences == 2
    for operation in (lambda: cache.update(0, 20, k, v), cache.finish_prefill):
        with pytest.raises(pikv.StateError, match=r"layer 0: its last update waits to be routed.*route\(0"):
            operation()
    cache.route(0, probabilities)
    with pytest.raises(pikv.StateError, match="has been settled"):
        cache.attend(0, q)
    for wrong in (k[:1], k[:, :1]):
        with pytest.raises(pikv.InputError, match="k must"):
            cache.update(0, 20, wrong, wrong)
    with pytest.raises(pikv.InputError, match="q must"):
        cache.attend(0, q[:1])
    with pytest.raises(pikv.InputError, match="shards must be between 0 and 1, got"):
        cache.retrieve(0, 2)
    cache.reset()
    cache.update(0, 0, k[:1], v[:1])
    assert cache.sequences == 1


def test_a_layer_without_room_is_settled_later():
    """PoolFullError, and nothing is lost or stored twice."""
    stride = EXACT.form(MODEL, 0).stride
    pool = pikv.PagePool(MODEL, EXACT, capacity_bytes=8 * stride)
    hog = pool.allocate(EXACT.form(MODEL, 0), 8)
    cache = pikv.ExpertKVCache(MODEL, EXACT, shards=2, pool=pool)
    k, v, _, probabilities = texts(70)
    cache.update(0, 0, k, v)
    for operation in (lambda: cache.route(0, probabilities), cache.finish_prefill):
        with pytest.raises(pikv.PoolFullError):
            operation()
    pool.release(EXACT.form(MODEL, 0), hog)
    cache.route(0, probabilities)
    assert cache.stored_bytes().pages
    stored = torch.cat([cache.retrieve(0, shard).positions[:, 0] for shard in (0, 1)], dim=-1)
    assert all(row[row >= 0].sort().values.tolist() == list(range(70)) for row in stored)


@pytest.mark.parametrize(
    ("settings", "shards", "said"),
    [
        ({"router": None}, 2, "route needs a router"),
        ({}, 0, "shards must be between 1 and experts = 6, got 0"),
        ({}, 7, "got 7"),
        ({"predictor": AsThisLayer(), "tiers": [HostTier(capacity_bytes=1 << 40)]}, 2, "leave the predictor out"),
        ({"transport": Solo(), "sharding": ExpertGroups()}, 2, r"by ExpertGroups\(\)"),
        (
            {"token_selector": HeavyHitters(recent=8), "allocator": Uniform(), "budget_tokens": 512},
            2,
            "HeavyHitters rem",
        ),
        (
            {"token_selector": ChunkKV(layers_a_choice=2), "allocator": Uniform(), "budget_tokens": 512},
            2,
            "ChunkKV has layers keep what others keep",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings, shards, said):
    """With the reason."""
    runtime = pikv.RuntimeConfig(**{"router": LatencyAware(), "tail_tokens": 16} | settings)
    with pytest.raises(pikv.ConfigError, match=said):
        pikv.ExpertKVCache(MODEL, runtime, shards=shards)


def test_other_selectors_may_bound_a_shard():
    """By keys, say."""
    runtime = pikv.RuntimeConfig(
        page_size=16,
        tail_tokens=16,
        router=TopK(),
        token_selector=KeyDiff(recent=8),
        allocator=Uniform(),
        budget_tokens=48,
    )
    cache = pikv.ExpertKVCache(MODEL, runtime, shards=2)
    fill(cache, 200, prompt=150)
    assert int(cache.retrieve(0, 0).mask.sum(-1).max()) <= 48
