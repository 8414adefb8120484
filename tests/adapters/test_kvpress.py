"""Presses as token selectors: what kvpress says of a row, and what PiKV's own selectors say beside it."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given

import pikv
from pikv import ConfigError
from pikv.policies import KeyDiff, KeyNorm, LagKV, SnapKV
from pikv.testing.requests import StoredTokens, stored_tokens
from pikv.testing.token_selector import TokenSelectorConformance

kvpress = pytest.importorskip("kvpress", reason="kvpress is missing: pip install pikv[peers]")
from pikv.adapters.kvpress import selector_of  # noqa: E402  # needs kvpress

pytestmark = [pytest.mark.peers, pytest.mark.property]
PAIRS = {
    "keydiff": (kvpress.KeyDiffPress(), KeyDiff()),
    "key_norm": (kvpress.KnormPress(), KeyNorm()),
    "lagkv": (kvpress.LagKVPress(lag_size=4, n_sink=2), LagKV(lag=4, sinks=2)),
    "snapkv": (kvpress.SnapKVPress(window_size=8, kernel_size=5), SnapKV(window=8)),
}


class TestKeyPress(TokenSelectorConformance):
    def make(self):
        return selector_of(kvpress.KeyDiffPress())


class TestQueryPress(TokenSelectorConformance):
    def make(self):
        return selector_of(kvpress.SnapKVPress(window_size=3))


def long_row() -> StoredTokens:
    """Two KV heads of two query heads each, 60 tokens."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 60, 8, generator=generator)
    return StoredTokens(
        layer=pikv.LayerConfig(query_heads=4, kv_heads=2, key_dim=8, value_dim=8),
        positions=torch.arange(60).int().expand(1, 2, -1),
        keys=keys,
        values=values,
        queries=torch.randn(1, 4, 8, 8, generator=generator),
        asked=torch.arange(52, 60)[None],
    )


@pytest.mark.parametrize("name", PAIRS)
def test_our_own_is_the_press(name):
    """PiKV's selector ranks tokens as the press does, and where the press has a plain formula, the numbers are its."""
    press, own = PAIRS[name]
    stored = long_row()
    theirs, ours = (each.score(stored.view()) for each in (selector_of(press), own))
    if name == "snapkv":  # its window stays in both, above all others by different numbers
        theirs, ours = theirs[..., :-8], ours[..., :-8]
    if name == "lagkv":  # the press leaves the sinks and the end out by a score of 1, as ours does
        assert bool((ours == 1).eq(theirs == 1).all())
    torch.testing.assert_close(ours, theirs)


@given(stored=stored_tokens(1))
def test_a_row_is_scored_alone(stored: StoredTokens):
    """Each row gets what the press says of its present tokens."""
    got = selector_of(kvpress.KeyDiffPress()).score(stored.view())
    for row, keys, present in zip(*(each.flatten(0, 1) for each in (got, stored.keys, stored.present)), strict=True):
        if present.any():
            expected = kvpress.KeyDiffPress().score(None, None, keys[present][None, None], None, None, {})
            torch.testing.assert_close(row[present], expected[0, 0])


@pytest.mark.parametrize(
    "press", [kvpress.CURPress(), kvpress.LagKVPress(lag_size=16), kvpress.SnapKVPress(window_size=16)]
)
def test_a_cache_keeps_to_its_budget_with_a_press(press):
    """Chunked prompts and decoding, in ragged rows."""
    model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8)
    selector = selector_of(press, recent=8)
    cache = pikv.compose(model, token_selector=selector, budget_tokens=96, page_size=16, tail_tokens=64)
    generator = torch.Generator().manual_seed(1)
    for first, tokens in [(0, 200), (200, 100), *((300 + i, 1) for i in range(10))]:
        k, v = torch.randn(2, 1, 2, tokens, 8, generator=generator)
        cache.update(0, first, k, v)
        cache.attend(0, torch.randn(1, 4, tokens, 8, generator=generator))
    assert int(cache.retrieve(0).mask.sum(-1).max()) <= 96


@pytest.mark.parametrize(
    ("press", "reason"),
    [
        (kvpress.TOVAPress(), "nearest is Tova"),
        (kvpress.ExpectedAttentionPress(), "nearest is ExpectedAttention"),
        (kvpress.AdaKVPress(kvpress.KnormPress()), "compose the selector with AdaKV"),
        (kvpress.RandomPress(), "not the same twice"),
        (kvpress.CURPress(use_random_leverage=True), "draws at random"),
        (kvpress.ThinKPress(), "not known to score"),
        (3, "int cannot be a token selector"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_what_cannot_be_is_refused_by_name(press, reason):
    """With the reason, and the nearest that can."""
    with pytest.raises(ConfigError, match=reason):
        selector_of(press)


def test_equal_presses_are_equal_selectors():
    """A press has no hash; its settings have."""
    one, other = selector_of(kvpress.SnapKVPress(window_size=8)), selector_of(kvpress.SnapKVPress(window_size=9))
    assert one != other
    assert hash(one) == hash(selector_of(kvpress.SnapKVPress(window_size=8)))
    assert attrs.fields(type(one)).press.eq_key is repr
