"""Rows that get what was planned for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.adapters.compressors import Int2, Int8
from pikv.policies import Planned, Recent
from pikv.testing.allocator import AllocatorConformance
from pikv.testing.filled import filled

pytestmark = pytest.mark.property
MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=32)
PARTS = {"token_selector": Recent(sinks=0, recent=16), "page_size": 16, "tail_tokens": 16}


def tokens_of(cache: pikv.PiKVCache) -> list[list[int]]:
    return [cache.retrieve(layer_id).mask.sum(-1)[0].tolist() for layer_id in range(2)]


class TestPlanned(AllocatorConformance):
    def make(self) -> Planned:
        return Planned(most=[[3, 1], [0, 2]])

    @given(pages=st.lists(st.integers(0, 6), min_size=4, max_size=4), tokens=st.integers(17, 140))
    def test_a_cache_keeps_the_plan_and_no_more(self, pages, tokens):
        """Each row has its pages and the tail, or all that a short text has; what one does not fill no other gets."""
        plan = Planned(most=[pages[:2], pages[2:]])
        cache = filled(pikv.compose(MODEL, allocator=plan, budget_tokens=16 + 6 * 16, **PARTS), tokens)
        wanted = [[min(tokens, 16 + 16 * count) for count in layer] for layer in plan.most]
        assert tokens_of(cache) == wanted

    def test_under_a_budget_below_the_plan_rows_get_less(self):
        """In proportion: 12 of 24 pages."""
        plan = Planned(most=[[2, 6], [12, 4]])
        cache = filled(pikv.compose(MODEL, allocator=plan, budget_tokens=16 + 3 * 16, **PARTS), 300)
        assert tokens_of(cache) == [[32, 64], [112, 48]]

    @pytest.mark.parametrize("most", [[[1, -1]], [[1.5, 2]]])
    def test_what_is_no_plan_is_refused(self, most):
        """Whole numbers from 0 on."""
        with pytest.raises(pikv.ConfigError, match="whole numbers of pages"):
            Planned(most=most)

    def test_by_name(self):
        """Files and command lines can say a plan, and page formats by layer."""
        names = {
            "allocator": {"name": "planned", "most": [[3, 1], [1, 2]]},
            "token_selector": "recent",
            "budget_tokens": 256,
            "compressor": ["int8", "int2"],
        }
        runtime = pikv.runtime_from(names, MODEL)
        assert runtime.allocator == Planned(most=[[3, 1], [1, 2]])
        assert runtime.compressor == (Int8(), Int2())
