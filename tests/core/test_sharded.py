"""Several ranks that store a cache together answer as one cache that stores all."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pikv
from pikv.core.ports import Sharding
from pikv.core.ports.transport import Solo
from pikv.policies import (
    AdaKV,
    ChunkKV,
    ExpertGroups,
    HeavyHitters,
    KvHeads,
    Pyramid,
    Recent,
    TokenRange,
    TopK,
    Uniform,
)
from pikv.testing import strategies as some
from pikv.testing.plain import PlainCache, rounding
from pikv.testing.transport import FakeTransport, run_ranks


@attrs.frozen(kw_only=True)
class Text:
    """Tokens of two sequences, the chunks that they come in, how they are routed, and what a plain cache answers."""

    model: pikv.ModelConfig
    runtime: pikv.RuntimeConfig
    positions: Tensor
    chunks: tuple[Tensor, ...]
    k: Tensor
    v: Tensor
    q: Tensor
    probabilities: Tensor
    expected: Tensor

    def on_ranks(self, sharding: Sharding, ranks: int) -> list[tuple[Tensor, Tensor]]:
        """What each rank answers, and the positions that it stores: [2, its kv_heads, tokens], padding below 0."""

        def rank(transport):
            cache = pikv.compose(
                self.model,
                transport=transport,
                sharding=sharding,
                page_size=self.runtime.page_size,
                tail_tokens=self.runtime.tail_tokens,
                router=TopK(),
            )
            outputs = []
            for chunk in self.chunks:
                cache.update(0, self.positions[:, chunk], self.k[:, :, chunk], self.v[:, :, chunk])
                outputs.append(cache.attend(0, self.q[:, :, chunk]))
                cache.route(0, self.probabilities[:, chunk])
                stored = cache.retrieve(0).positions
            return torch.cat(outputs, dim=2), stored

        return run_ranks(ranks, rank)

    def check(self, results: list[tuple[Tensor, Tensor]]) -> None:
        """Every rank answers right and alike; without a window each token of each head is stored exactly once."""
        for output, _ in results:
            torch.testing.assert_close(output.double(), self.expected, **rounding(self.model.dtype))
            assert torch.equal(output, results[0][0])
        layer = self.model.layers[0]
        if layer.window is None:
            stored = sum(int((positions >= 0).sum()) for _, positions in results)
            assert stored == int((self.positions >= 0).sum()) * layer.kv_heads


@st.composite
def texts(draw) -> Text:
    """A model of one layer and four experts, and up to 50 tokens for it."""
    shape, total, generator = draw(some.model_configs(max_layers=1)), draw(st.integers(1, 50)), draw(some.generators())
    model = pikv.ModelConfig.of(shape.layers, dtype=shape.dtype, experts=4, experts_per_token=2)
    layer = model.layers[0]
    positions, sizes = draw(some.positions(2, total)), draw(some.chunkings(total, max_chunks=3))
    chunks = torch.arange(total).split(sizes)
    heads = [(layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim), (layer.query_heads, layer.key_dim)]
    k, v, q = (torch.randn(2, n, total, dim, generator=generator).to(model.dtype) for n, dim in heads)
    plain, expected = PlainCache(model), []
    for chunk in chunks:
        plain.update(0, positions[:, chunk], k[:, :, chunk], v[:, :, chunk])
        expected.append(plain.attend(0, q[:, :, chunk], positions[:, chunk]))
    return Text(
        model=model,
        runtime=draw(some.runtime_configs()),
        positions=positions,
        chunks=chunks,
        k=k,
        v=v,
        q=q,
        probabilities=torch.rand(2, total, 4, generator=generator),
        expected=torch.cat(expected, dim=2),
    )


@pytest.mark.property
@given(text=texts(), ranks=st.integers(2, 3), tokens=st.integers(1, 7))
def test_every_rank_answers_as_if_it_held_everything(text, ranks, tokens):
    """Also with sink logits, which weigh once, and where a rank holds nothing; each token is stored exactly once."""
    results = text.on_ranks(TokenRange(tokens=tokens), ranks)
    text.check(results)
    for _, stored in results:
        owner = (stored[stored >= 0] // tokens) % ranks
        assert owner.unique().numel() <= 1


@pytest.mark.property
@given(text=texts(), tokens=st.integers(1, 7), data=st.data())
def test_ranks_that_store_other_heads_answer_as_one(text, tokens, data):
    """A rank stores its own heads; where ranks outnumber heads, its own tokens of them."""
    heads = text.model.layers[0].kv_heads
    ranks = data.draw(st.sampled_from([n for n in range(2, 7) if heads % n == 0 or n % heads == 0]))
    results = text.on_ranks(KvHeads(tokens=tokens), ranks)
    text.check(results)
    assert {stored.shape[1] for _, stored in results} == {max(1, heads // ranks)}


@pytest.mark.property
@given(text=texts(), ranks=st.integers(2, 4), tokens=st.integers(1, 7))
def test_ranks_that_store_what_their_experts_are_best_for_answer_as_one(text, ranks, tokens):
    """A token is at home where its first expert is, whoever had it until it was routed."""
    results = text.on_ranks(ExpertGroups(tokens=tokens), ranks)
    text.check(results)
    home = text.probabilities.argmax(-1) % ranks
    for rank, (_, stored) in enumerate(results):
        for sequence in range(2):
            here = text.positions[sequence, (home[sequence] == rank) & (text.positions[sequence] >= 0)]
            if text.model.layers[0].window is None:
                assert stored[sequence, 0][stored[sequence, 0] >= 0].tolist() == here.tolist()


MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=8)


def random_tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and q of two sequences."""
    k, v = torch.randn(2, 2, 2, count, 8, generator=torch.Generator().manual_seed(0))
    return k, v, torch.cat([k, v], dim=1)


def test_a_rank_that_is_alone_asks_nobody():
    """A group of one answers as a cache without a transport, bit for bit."""
    k, v, q = random_tokens(40)
    outputs = []
    for settings in ({}, {"transport": Solo(), "sharding": TokenRange()}, {"transport": Solo(), "sharding": KvHeads()}):
        cache = pikv.compose(MODEL, **settings)
        cache.update(0, 0, k, v)
        outputs.append(cache.attend(0, q))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_heads_that_are_stored_apart_keep_what_they_would_keep_together():
    """Under a budget the rows are those of one cache, bit for bit: it is shared out for all heads on every rank."""
    settings = {"allocator": Pyramid(), "token_selector": Recent(), "budget_tokens": 96, "page_size": 16}
    k, v, q = random_tokens(300)

    def decode(**places) -> list[pikv.ContextKV]:
        cache = pikv.compose(MODEL, tail_tokens=32, **settings, **places)
        for chunk in torch.arange(300).split([250, *[1] * 50]):
            for layer_id in range(2):
                cache.update(layer_id, int(chunk[0]), k[:, :, chunk], v[:, :, chunk])
                cache.attend(layer_id, q[:, :, chunk])
        return [cache.retrieve(layer_id) for layer_id in range(2)]

    alone = decode()
    apart = run_ranks(2, lambda transport: decode(transport=transport, sharding=KvHeads()))
    for layer_id, whole in enumerate(alone):
        for name in ("keys", "positions"):
            parts = [getattr(held[layer_id], name) for held in apart]
            assert torch.equal(torch.cat(parts, dim=1), getattr(whole, name))


@pytest.mark.parametrize(
    ("heads", "ranks", "settings", "chosen"),
    [
        (8, 2, {}, KvHeads()),
        (2, 4, {}, KvHeads()),
        (6, 4, {}, TokenRange()),
        (8, 2, {"allocator": AdaKV(), "token_selector": Recent(), "budget_tokens": 512}, TokenRange()),
    ],
)
def test_the_composer_chooses_by_the_heads_and_the_ranks(heads, ranks, settings, chosen):
    """By KV head where that can be."""
    model, transport = (
        pikv.ModelConfig(layers=1, query_heads=24 * 8, kv_heads=heads, head_dim=8),
        FakeTransport.group(ranks)[0],
    )
    assert pikv.compose(model, transport=transport, **settings).runtime.sharding == chosen
    if not settings:
        assert pikv.runtime_from({}, model, transport=transport).sharding == chosen


TWO_HEIGHTS = pikv.ModelConfig.of([attrs.evolve(MODEL.layers[0], kv_heads=heads, query_heads=4) for heads in (4, 1)])
BUDGET = {"token_selector": Recent(sinks=0), "tail_tokens": 32, "page_size": 16}


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (TWO_HEIGHTS, {}, r"of all layers alike, got groups \[1, 2\] on 2 ranks"),
        (MODEL, BUDGET | {"allocator": AdaKV(), "budget_tokens": 64}, "by scores, and with KvHeads no rank has those"),
        (MODEL, BUDGET | {"budget_tokens": 31}, r"budget_tokens must be >= .* = 1 \* 32, got 31"),
    ],
)
def test_heads_apart_are_refused_where_that_cannot_work(model, settings, said):
    """With the reason."""
    transport = FakeTransport.group(2)[0]
    with pytest.raises(pikv.ConfigError, match=said):
        pikv.compose(model, transport=transport, sharding=KvHeads(), **settings)


def test_a_budget_must_be_enough_for_all_ranks_of_a_head():
    """Four ranks share the two heads by two."""
    transport = FakeTransport.group(4)[0]
    with pytest.raises(pikv.ConfigError, match=r"= 2 \* 32, got 40"):
        pikv.compose(MODEL, transport=transport, sharding=KvHeads(), budget_tokens=40, **BUDGET)


ROUTED = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=8, experts=4, experts_per_token=2)


def by_expert(**settings) -> pikv.PiKVCache:
    """A cache that is alone and waits for routing, with 40 tokens in layer 0 that have attended."""
    cache = pikv.compose(
        ROUTED, transport=Solo(), sharding=ExpertGroups(), router=TopK(), page_size=16, tail_tokens=16, **settings
    )
    k, v, q = random_tokens(40)
    cache.update(0, 0, k, v)
    cache.attend(0, q)
    return cache


PROBABILITIES = torch.rand(2, 40, 4, generator=torch.Generator().manual_seed(0))


BEFORE_ROUTE = {
    "update": lambda cache: cache.update(0, 40, *random_tokens(1)[:2]),
    "finish_prefill": lambda cache: cache.finish_prefill(),
    "fork": lambda cache: cache.fork(),
    "join": lambda cache: cache.join(cache),
    "reorder": lambda cache: cache.reorder([1, 0]),
    "crop": lambda cache: cache.crop(3),
    "commit": lambda cache: cache.commit(),
}


@pytest.mark.parametrize("operation", BEFORE_ROUTE.values(), ids=BEFORE_ROUTE)
def test_what_comes_before_route_is_refused(operation):
    """StateError that says so; after route, or after a reset, the cache goes on."""
    cache = by_expert()
    assert cache.waits_for_route
    with pytest.raises(pikv.StateError, match=r"layer 0: its last update waits to be routed.*call route\(0"):
        operation(cache)
    cache.route(0, PROBABILITIES)
    cache.update(0, 40, *random_tokens(1)[:2])
    cache.reset()
    cache.update(0, 0, *random_tokens(1)[:2])


def test_a_layer_without_room_is_settled_by_another_route():
    """PoolFullError, the tokens at home meanwhile, and none of them twice."""
    runtime = by_expert().runtime
    pool = pikv.PagePool(ROUTED, runtime, capacity_bytes=8 * runtime.form(ROUTED, 0).stride)
    hog = pool.allocate(runtime.form(ROUTED, 0), 8)
    cache = by_expert(pool=pool)
    with pytest.raises(pikv.PoolFullError):
        cache.route(0, PROBABILITIES)
    pool.release(runtime.form(ROUTED, 0), hog)
    cache.route(0, PROBABILITIES)
    assert cache.stored_bytes().pages
    assert cache.retrieve(0).positions.tolist() == torch.arange(40).expand(2, 2, 40).tolist()


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (MODEL, {"router": TopK()}, "ExpertGroups needs experts in the model and a router"),
        (ROUTED, {}, r"the nearest router is TopK\(\)"),
        (
            ROUTED,
            {"router": TopK(), "token_selector": HeavyHitters(), "allocator": Uniform(), "budget_tokens": 512},
            "HeavyHitters remembers",
        ),
        (
            ROUTED,
            {"router": TopK(), "token_selector": ChunkKV(layers_a_choice=2), "budget_tokens": 512},
            "ChunkKV has layers keep what others keep",
        ),
    ],
)
def test_experts_apart_are_refused_where_that_cannot_work(model, settings, said):
    """With the reason."""
    with pytest.raises(pikv.ConfigError, match=said):
        pikv.compose(model, transport=Solo(), sharding=ExpertGroups(), **settings)


def test_more_places_than_experts_are_refused():
    """A place without an expert would store nothing."""
    with pytest.raises(pikv.ConfigError, match="got 4 experts and 5 ranks"):
        pikv.compose(ROUTED, transport=FakeTransport.group(5)[0], sharding=ExpertGroups(), router=TopK())
