"""Token selectors from papers: each score against its formula, worked out by hand or by plain loops."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given

import pikv
from pikv import ConfigError
from pikv.core.ports import TokenSelector
from pikv.policies import ChunkKV, ExpectedAttention, KeyDiff, KeyNorm, LagKV, SnapKV, Tova
from pikv.testing.requests import StoredTokens, stored_tokens
from pikv.testing.token_selector import TokenSelectorConformance

pytestmark = pytest.mark.property


def stored(keys: torch.Tensor, **others: torch.Tensor) -> StoredTokens:
    """Tokens at positions from 0 on; keys [sequences, kv_heads, tokens, dim], all else zeros unless given."""
    sequences, kv_heads, tokens, dim = keys.shape
    queries = others.get("queries", torch.zeros(sequences, kv_heads, 1, dim))
    asked = torch.arange(tokens - queries.shape[2], tokens).expand(sequences, -1)
    return StoredTokens(
        layer=pikv.LayerConfig(query_heads=queries.shape[1], kv_heads=kv_heads, key_dim=dim, value_dim=dim),
        positions=torch.arange(tokens).int().expand(sequences, kv_heads, -1),
        keys=keys,
        values=others.get("values", torch.zeros_like(keys)),
        queries=queries,
        asked=asked,
    )


def scores(selector: TokenSelector, keys: Any, **others: torch.Tensor) -> list[float]:
    """The scores of one row, keys [tokens, dim]."""
    view = stored(torch.as_tensor(keys)[None, None], **others).view()
    return [round(score, 5) for score in selector.score(view).flatten().tolist()]


class TestKeyNorm(TokenSelectorConformance):
    def make(self) -> KeyNorm:
        return KeyNorm()

    def test_by_hand(self):
        """-|k|: the shortest key is the last to leave."""
        assert scores(KeyNorm(), [[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]) == [-5, -1, 0]


class TestKeyDiff(TokenSelectorConformance):
    def make(self) -> KeyDiff:
        return KeyDiff()

    def test_by_hand(self):
        """The mean of the directions (1, 0), (1, 0) and (0, 1) points along (2, 1); lengths do not matter."""
        expected = [round(-x / math.sqrt(5), 5) for x in (2, 2, 1)]
        assert scores(KeyDiff(), [[1.0, 0.0], [7.0, 0.0], [0.0, 2.0]]) == expected


class TestSnapKV(TokenSelectorConformance):
    def make(self) -> SnapKV:
        return SnapKV(window=3)

    def test_by_hand(self):
        """Two queries see e^0, e^0, e^log(2): 1/4, 1/4, 1/2 of it before the window, pooled by threes."""
        keys = torch.tensor([[0.0], [0.0], [math.log(2)], [-100.0], [-100.0]])
        queries = torch.ones(1, 1, 2, 1)
        pooled = [(0 + 0.25 + 0.25) / 3, (0.25 + 0.25 + 0.5) / 3, (0.25 + 0.5 + 0) / 3]
        got = scores(SnapKV(window=2, kernel=3), keys, queries=queries)
        assert got == [*(round(mean, 5) for mean in pooled), 2, 2]

    @given(drawn=stored_tokens(3))
    def test_the_window_is_above_all(self, drawn: StoredTokens):
        """Tokens at or past the oldest of the newest queries outscore the others."""
        got = SnapKV(window=3).score(drawn.view())
        oldest = drawn.asked.masked_fill(drawn.asked < 0, 1000).amin(-1)[:, None, None]
        assert bool(((got > 1) == (drawn.positions >= oldest))[drawn.present].all())

    def test_the_window_stays(self):
        """Its tokens are the recent ones of the cache."""
        assert SnapKV(window=7).recent == 7


class TestTova(TokenSelectorConformance):
    def make(self) -> Tova:
        return Tova()

    def test_by_hand(self):
        """Two heads of one query give (1/2, 1/2) and (1/5, 4/5): their mean, in both rows."""
        keys = torch.tensor([[[0.0], [0.0]], [[0.0], [math.log(4)]]])[None]
        got = Tova().score(stored(keys, queries=torch.ones(1, 2, 1, 1)).view())
        torch.testing.assert_close(got, torch.tensor([[[0.35, 0.65], [0.35, 0.65]]]))

    def test_rows_that_hold_other_tokens(self):
        """A token of one row alone gets what that row's heads give it, halved."""
        keys = torch.zeros(1, 2, 2, 1)
        view = stored(keys, queries=torch.ones(1, 2, 1, 1))
        rows = attrs.evolve(view, positions=torch.tensor([[[0, 3], [1, 3]]]).int(), asked=torch.tensor([[3]]))
        got = Tova().score(rows.view())
        torch.testing.assert_close(got, torch.tensor([[[0.25, 0.5], [0.25, 0.5]]]))


class TestLagKV(TokenSelectorConformance):
    def make(self) -> LagKV:
        return LagKV(lag=2, sinks=1)

    def test_by_hand(self):
        """On the scale of the next stretch (0..1, 0..2) the keys are (0, 1) and (1, 1): the first spreads wider."""
        keys = [[9.0, 9.0], [0.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, 2.0], [5.0, 5.0]]
        assert scores(LagKV(lag=2, sinks=1), keys) == [1, 0.5, 0, 1, 1, 1]

    def test_a_short_row_stays(self):
        """Less than two stretches beyond the sinks have nothing to be compared with."""
        assert scores(LagKV(lag=2, sinks=1), [[1.0], [2.0], [3.0], [4.0]]) == [1, 1, 1, 1]


class TestChunkKV(TokenSelectorConformance):
    def make(self) -> ChunkKV:
        return ChunkKV(window=2, chunk=2)

    def test_by_hand(self):
        """One query gives 1/8, 1/8, 1/4, 1/2 to four tokens: chunks of two get 1/8 and 3/8 each."""
        keys = [[0.0], [0.0], [math.log(2)], [math.log(4)]]
        got = scores(ChunkKV(chunk=2, window=1), keys, queries=torch.ones(1, 1, 1, 1))
        assert got == [0.125, 0.125, 0.375, 0.375]

    def test_layers_take_turns_to_choose(self):
        """Of two neighbours the first chooses: layers 0 and 1 keep the same tokens, and 2 and 3 do."""
        assert [ChunkKV(layers_a_choice=2).leader(layer) for layer in range(5)] == [0, 0, 2, 2, 4]
        assert [ChunkKV().leader(layer) for layer in range(3)] == [0, 1, 2]

    def test_heads_keep_the_same_chunks(self):
        """The score is a mean over the layer's heads."""
        keys = torch.tensor([[[0.0], [0.0]], [[0.0], [math.log(4)]]])[None]
        got = ChunkKV(chunk=1, window=1).score(stored(keys, queries=torch.ones(1, 2, 1, 1)).view())
        torch.testing.assert_close(got, torch.tensor([[[0.35, 0.65], [0.35, 0.65]]]))


class TestExpectedAttention(TokenSelectorConformance):
    def make(self) -> ExpectedAttention:
        return ExpectedAttention(window=3, future=5, sinks=1)

    def test_by_formula(self):
        """Each step in float64, position by position, for one head and one future position after another."""
        generator = torch.Generator().manual_seed(0)
        keys, values = torch.randn(2, 1, 1, 9, 8, generator=generator)
        plain = torch.randn(4, 8, generator=generator).double()
        rotary, asked, future = pikv.Rotary.of(dim=8), torch.arange(5, 9), torch.arange(9, 15)
        tokens = stored(keys, values=values, queries=rotary.apply(plain, asked)[None, None].float())
        turn = torch.stack([rotary.apply(torch.eye(8).double(), place.expand(8)) for place in future]).mean(0).T
        mean, covariance = turn @ plain.mean(0), turn @ torch.cov(plain.T, correction=0) @ turn.T
        k = keys[0, 0, 2:].double()
        logits = k @ mean / math.sqrt(8) + ((k @ covariance) * k).sum(-1) / 16
        expected = logits.softmax(-1) * values[0, 0, 2:].double().norm(dim=-1)
        layer = attrs.evolve(tokens.layer, rotary=rotary)
        got = ExpectedAttention(window=4, future=6, sinks=2).score(attrs.evolve(tokens, layer=layer).view())
        torch.testing.assert_close(got[0, 0, 2:].double(), expected, atol=1e-5, rtol=1e-4)
        assert not got[0, 0, :2].any()

    def test_a_model_that_rotates_in_an_unknown_way_is_refused(self):
        """It needs the queries before rotation."""
        model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8)
        with pytest.raises(ConfigError, match="no rotary"):
            pikv.compose(model, token_selector=ExpectedAttention(), budget_tokens=256)


@pytest.mark.parametrize("part", [KeyNorm, KeyDiff, SnapKV, Tova, LagKV, ChunkKV, ExpectedAttention])
@pytest.mark.parametrize("wrong", [-1, 2.5])
def test_counts_that_cannot_work_are_refused(part, wrong):
    """The message names the part and its field."""
    with pytest.raises(ConfigError, match=f"sinks of {part.__name__} must be a whole number"):
        part(sinks=wrong)


NAMES = ["chunkkv", "expected_attention", "h2o", "key_norm", "keydiff", "lagkv", "snapkv", "streaming_llm", "tova"]


@pytest.mark.parametrize("name", NAMES)
def test_they_hold_a_budget(name):
    """Each composes by its name, and a prompt and decoded tokens keep to the budget."""
    rotary = pikv.Rotary.of(dim=8)
    model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8, rotary=rotary)
    names = {"token_selector": name, "budget_tokens": 96, "page_size": 16, "tail_tokens": 64}
    cache = pikv.PiKVCache(model, pikv.runtime_from(names, model))
    generator = torch.Generator().manual_seed(1)
    for first, tokens in [(0, 200), (200, 200), *((400 + i, 1) for i in range(20))]:
        k, v = torch.randn(2, 1, 2, tokens, 8, generator=generator)
        cache.update(0, first, k, v)
        cache.attend(0, torch.randn(1, 4, tokens, 8, generator=generator))
    assert int(cache.retrieve(0).mask.sum(-1).max()) <= 96
    assert int(cache.retrieve(0).mask.sum(-1).min()) > 64
