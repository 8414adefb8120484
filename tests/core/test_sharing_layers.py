"""Layers that keep the tokens which another layer keeps."""

from __future__ import annotations

from typing import final

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.core.ports import QueryTokenSelector, SharingTokenSelector
from pikv.testing import strategies as some

MODEL = pikv.ModelConfig(layers=4, query_heads=4, kv_heads=2, head_dim=8)


@final
@attrs.frozen(kw_only=True)
class Shared(QueryTokenSelector, SharingTokenSelector):
    """What the newest query attends to; pairs of layers keep the same. asked: of which layers score was called."""

    leaders: tuple[int, ...] = (0, 0, 2, 2)
    sinks: int = 1
    recent: int = 2
    window: int = 3
    asked: list[int] = attrs.field(factory=list, eq=False)

    def leader(self, layer_id):
        return self.leaders[layer_id]

    def score(self, view):
        self.asked.append(view.layer_id)
        return view.mass()


def fed(cache, generator, chunks):
    first = 0
    for tokens in chunks:
        for layer_id in range(len(cache.model.layers)):
            k, v = torch.randn(2, 2, 2, tokens, 8, generator=generator)
            cache.update(layer_id, first, k, v)
            cache.attend(layer_id, torch.randn(2, 4, tokens, 8, generator=generator))
        first += tokens
    return cache


@pytest.mark.property
@given(
    chunks=st.lists(st.integers(1, 90), min_size=1, max_size=4), decoded=st.integers(0, 40), generator=some.generators()
)
def test_followers_keep_what_their_leader_keeps(chunks, decoded, generator):
    """In prompts and while decoding, page by page, and they score nothing themselves."""
    selector = Shared()
    cache = pikv.compose(MODEL, token_selector=selector, budget_tokens=48, page_size=16, tail_tokens=16)
    fed(cache, generator, [*chunks, *(1,) * decoded])
    cache.finish_prefill()
    kept = [cache.retrieve(layer_id).positions for layer_id in range(4)]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[2], kept[3])
    assert set(selector.asked) <= {0, 2}


def test_followers_keep_what_their_leader_is_about_to_keep():
    """Where all layers are cut at once, at the end of a prompt that nobody attended to."""

    @attrs.frozen
    class Longest(SharingTokenSelector):
        sinks: int = 0
        recent: int = 2

        def leader(self, layer_id):
            return 0

        def score(self, view):
            return view.keys.norm(dim=-1)

    cache = pikv.compose(MODEL, token_selector=Longest(), budget_tokens=48, page_size=16, tail_tokens=16)
    generator = torch.Generator().manual_seed(0)
    for layer_id in range(4):
        cache.update(layer_id, 0, *torch.randn(2, 2, 2, 100, 8, generator=generator))
    cache.finish_prefill()
    first, *others = (cache.retrieve(layer_id).positions for layer_id in range(4))
    assert first.shape == (2, 2, 48)
    for positions in others:
        assert torch.equal(positions, first)


def test_followers_keep_no_queries():
    """Two of four layers hold the window of 3 queries of 4 heads of 8 channels, and where they stood."""
    settings = {"budget_tokens": 48, "page_size": 16, "tail_tokens": 16}
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    shared, alone = (
        fed(pikv.compose(MODEL, token_selector=Shared(leaders=leaders), **settings), generator, [100])
        for leaders, generator in zip(((0, 0, 2, 2), (0, 1, 2, 3)), generators, strict=True)
    )
    assert alone.stored_bytes().tail - shared.stored_bytes().tail == 2 * 2 * (3 * 4 * 8 * 4 + 3 * 8)


@pytest.mark.parametrize(
    ("leaders", "message"),
    [
        ((1, 1), "Shared: layer 0 must follow itself or an earlier layer that follows no other, got layer 1"),
        ((0, 0, 1), "layer 2 must follow .* got layer 1"),
        ((0, -1), "layer 1 must follow .* got layer -1"),
    ],
)
def test_leaders_that_cannot_lead_are_refused(leaders, message):
    """When composed, by layer."""
    model = pikv.ModelConfig(layers=len(leaders), query_heads=4, kv_heads=2, head_dim=8)
    with pytest.raises(pikv.ConfigError, match=message):
        pikv.compose(model, token_selector=Shared(leaders=leaders), budget_tokens=256)


def test_layers_with_other_rows_cannot_follow():
    """A leader of two KV heads has no row for a follower's third."""
    layers = [pikv.LayerConfig(query_heads=4, kv_heads=heads, key_dim=8, value_dim=8) for heads in (2, 4)]
    with pytest.raises(pikv.ConfigError, match="layer 1 has 4 KV heads and cannot keep the tokens of layer 0"):
        pikv.compose(pikv.ModelConfig.of(layers), token_selector=Shared(leaders=(0, 0)), budget_tokens=256)


def test_a_follower_before_its_leader_says_so():
    """And nothing has changed: with the leader's tokens there it goes on."""
    model = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=8)
    cache = pikv.compose(model, token_selector=Shared(), budget_tokens=48, page_size=16, tail_tokens=16)
    k, q = torch.randn(1, 2, 100, 8), torch.randn(1, 4, 100, 8)
    cache.update(1, 0, k, k)
    with pytest.raises(pikv.StateError, match="layer 1 keeps what layer 0 keeps, which is empty"):
        cache.attend(1, q)
    cache.update(0, 0, k, k)
    cache.attend(0, q)
    cache.attend(1, q)
    assert torch.equal(cache.retrieve(0).positions, cache.retrieve(1).positions)
