"""Page formats and bounds that differ by layer."""

from __future__ import annotations

import attrs
import pytest
import torch

import pikv
from pikv.adapters.compressors import Int2, Int4, Int8
from pikv.core.exact import Exact
from pikv.policies import Planned, Quest, Recent
from pikv.testing.filled import filled

MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=32)


def test_an_allocators_bounds_hold_whatever_the_budget_leaves():
    """Layers may differ in heads; what is not given out is not kept."""
    layers = [pikv.LayerConfig(query_heads=4, kv_heads=heads, key_dim=32, value_dim=32) for heads in (2, 1)]
    model, states = pikv.ModelConfig.of(layers), torch.randn(1, 2, 300, 32)
    parts = {"token_selector": Recent(sinks=0, recent=16), "page_size": 16, "tail_tokens": 16}
    cache = pikv.compose(model, allocator=Planned(most=[[3, 0], [5]]), budget_tokens=160, **parts)
    for layer_id, heads in enumerate((2, 1)):
        cache.update(layer_id, 0, states[:, :heads], states[:, :heads])
    cache.finish_prefill()
    assert [cache.retrieve(i).mask.sum(-1)[0].tolist() for i in range(2)] == [[64, 16], [96]]


@pytest.mark.parametrize(("most", "said"), [([[1, 1]], "make it for this model"), ([[1, 0], [1, 1]], "4 sinks")])
def test_a_plan_that_does_not_fit_is_refused(most, said):
    """When composed: for another model, or without room for the sinks."""
    parts = {"token_selector": Recent(sinks=4, recent=8), "tail_tokens": 16, "page_size": 16}
    with pytest.raises(pikv.ConfigError, match=said):
        pikv.compose(MODEL, allocator=Planned(most=most), budget_tokens=64, **parts)


@pytest.mark.parametrize("compressors", [(Exact(), Int2()), (Int8(), Int4()), (Int4(), Int4())])
@pytest.mark.parametrize("page_selector", [None, Quest(pages=100)])
def test_each_layer_has_its_own_page_format(compressors, page_selector):
    """What a layer answers and stores is what it does where all layers have its format."""
    parts = {"page_selector": page_selector, "page_size": 16, "tail_tokens": 16}
    mixed = filled(pikv.compose(MODEL, compressor=list(compressors), **parts), 100)
    alone = [filled(pikv.compose(MODEL, compressor=each, **parts), 100) for each in compressors]
    assert mixed.stored_bytes().pages == sum(cache.stored_bytes().pages for cache in alone) // 2
    for layer_id, cache in enumerate(alone):
        assert torch.equal(mixed.retrieve(layer_id).keys, cache.retrieve(layer_id).keys)
        token = torch.randn(1, 2, 1, 32)
        answers = []
        for each in (mixed, cache):
            each.update(layer_id, 100, token, token)
            answers.append(each.attend(layer_id, torch.ones(1, 4, 1, 32)))
        assert torch.equal(*answers)


def test_one_page_format_for_each_layer_or_for_all():
    """Another number of them is refused, as is what is no compressor."""
    with pytest.raises(pikv.ConfigError, match="each of 2, got 3"):
        pikv.compose(MODEL, compressor=[Exact()] * 3)
    for wrong in ([Exact(), "int4"], [], "int4"):
        with pytest.raises(pikv.ConfigError, match="compressor must be a Compressor object"):
            attrs.evolve(pikv.RuntimeConfig(), compressor=wrong)
