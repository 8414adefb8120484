"""Retrieval heads and streaming heads, told or calibrated."""

from __future__ import annotations

import pytest
import torch

import pikv
from pikv import ConfigError
from pikv.core.views import AllocationRequest
from pikv.policies import DuoAttention, Importance, Recent
from pikv.policies.duo_attention import reach
from pikv.testing.allocator import AllocatorConformance
from pikv.testing.requests import StoredTokens

pytestmark = pytest.mark.property
MODEL = pikv.ModelConfig(layers=2, query_heads=2, kv_heads=2, head_dim=8)


def request(budget: int, *, floor: int = 0, ceiling: int = 6) -> AllocationRequest:
    """Two layers of two heads."""
    shape = (1, 2, 2)
    return AllocationRequest(
        budget_pages=torch.tensor([budget]),
        floor=torch.full(shape, floor),
        ceiling=torch.full(shape, ceiling),
        page_size=16,
    )


def shares(asked: AllocationRequest, allocator: DuoAttention) -> list[list[int]]:
    layers = allocator.layers(asked)
    return [allocator.heads(asked, layer, layers[:, layer], None)[0].tolist() for layer in range(2)]


class TestDuoAttention(AllocatorConformance):
    def make(self) -> DuoAttention:
        return DuoAttention(retrieval=[(0, 0)])

    @pytest.mark.parametrize(
        ("budget", "expected"),
        [
            (4, [[2, 0], [0, 2]]),
            (12, [[6, 0], [0, 6]]),  # all that exists
            (16, [[6, 2], [2, 6]]),  # what they cannot fill
        ],
    )
    def test_by_hand(self, budget, expected):
        """Two of four heads retrieve; each has 6 pages at most."""
        assert shares(request(budget), DuoAttention(retrieval=[(0, 0), (1, 1)])) == expected

    def test_streaming_heads_keep_the_pages_of_their_sinks(self):
        """Their floor."""
        assert shares(request(8, floor=1), DuoAttention(retrieval=[(1, 0)])) == [[1, 1], [5, 1]]

    def test_heads_of_another_model_are_refused(self):
        """A calibration is of one model."""
        for wrong in [(2, 0), (0, 2), (-1, 0)]:
            with pytest.raises(ConfigError, match="calibrate for this model"):
                DuoAttention(retrieval=[wrong]).layers(request(4))


def test_reach_by_hand():
    """Two queries at 8 and 9 over ten equal keys: 9 and 10 are seen, of which 8 - 2 - 2 + 1 = 5 and 6 are far."""
    tokens = StoredTokens(
        layer=pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=4, value_dim=4),
        positions=torch.arange(10).int()[None, None],
        keys=torch.zeros(1, 1, 10, 4),
        values=torch.zeros(1, 1, 10, 4),
        queries=torch.zeros(1, 1, 3, 4),
        asked=torch.tensor([[-1, 8, 9]]),
    )
    expected = torch.tensor([(5 / 9 + 6 / 10) / 2])
    torch.testing.assert_close(reach(tokens.view(), sinks=2, recent=2), expected)


def filled(*, allocator: DuoAttention | None = None, budget: int = 512) -> pikv.PiKVCache:
    """A cache of 300 tokens, in which head 1 of layer 0 attends to all alike and the others to the newest alone."""
    cache = pikv.compose(
        MODEL,
        allocator=allocator,
        token_selector=Importance(window=16, recent=8),
        budget_tokens=budget,
        page_size=16,
        tail_tokens=16,
    )
    keys = torch.linspace(0, 300, 300)[None, None, :, None].expand(1, 2, -1, 8)
    for layer_id in range(2):
        queries = torch.ones(1, 2, 300, 8)
        queries[:, 1] = 0 if layer_id == 0 else 1
        cache.update(layer_id, 0, keys, torch.ones_like(keys))
        cache.attend(layer_id, queries)
    cache.finish_prefill()
    return cache


def test_calibration_finds_the_head_that_reaches():
    """And the calibrated budget gives it the pages: the others keep their tails and sinks' pages."""
    calibrating = filled()
    allocator = DuoAttention.calibrated([calibrating.view(i) for i in range(2)], heads=1)
    assert allocator == DuoAttention(retrieval=[(0, 1)])
    cache = filled(allocator=allocator, budget=64)
    kept = [cache.retrieve(i).mask[0].sum(-1).tolist() for i in range(2)]
    assert kept == [[32, 16 + 9 * 16], [32, 32]]


@pytest.mark.parametrize("heads", [0, 5])
def test_heads_are_counted(heads):
    """At least one, at most all of the model."""
    calibrating = filled()
    with pytest.raises(ConfigError, match="between 1 and the model's 4"):
        DuoAttention.calibrated([calibrating.view(i) for i in range(2)], heads=heads)


def test_a_view_without_queries_is_refused():
    """Reach is measured on queries, which are kept for a selector that looks at them."""
    cache = pikv.compose(MODEL, token_selector=Recent(), budget_tokens=512)
    states = torch.zeros(1, 2, 20, 8)
    cache.update(0, 0, states, states)
    with pytest.raises(pikv.StateError, match="no queries"):
        DuoAttention.calibrated([cache.view(0)], heads=1)


def test_names_are_pairs_in_lists():
    """As JSON has them."""
    names = {
        "allocator": {"name": "duo_attention", "retrieval": [[0, 1]]},
        "token_selector": "recent",
        "budget_tokens": 256,
    }
    assert pikv.runtime_from(names, MODEL).allocator == DuoAttention(retrieval=[(0, 1)])
