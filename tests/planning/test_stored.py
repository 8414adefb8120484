"""Plans agree with caches that were filled."""

from __future__ import annotations

import pytest
import torch

import pikv
from pikv.compositions import parse
from pikv.planning.stored import CachePlan

TOKENS = 3072
LAYERS = (
    pikv.LayerConfig(query_heads=4, kv_heads=2, key_dim=64, value_dim=64),
    pikv.LayerConfig(query_heads=4, kv_heads=2, key_dim=64, value_dim=64, window=512),
    pikv.LayerConfig(query_heads=4, kv_heads=1, key_dim=96, value_dim=64, values="key_prefix"),
)
PLAIN = (pikv.LayerConfig(query_heads=4, kv_heads=2, key_dim=64, value_dim=64),) * 3


def filled(model: pikv.ModelConfig, runtime: pikv.RuntimeConfig, *, tokens: int, batch: int) -> pikv.PiKVCache:
    """A cache after a prompt and a few decoded tokens."""
    cache, prompt = pikv.PiKVCache(model, runtime), tokens - 3
    for first, count in [(0, prompt), *((token, 1) for token in range(prompt, tokens))]:
        for layer_id, layer in enumerate(model.layers):
            keys = torch.randn(batch, layer.kv_heads, count, layer.key_dim, dtype=model.dtype)
            values = torch.randn(batch, layer.kv_heads, count, layer.value_dim, dtype=model.dtype)
            cache.update(layer_id, first, keys, values if layer.values == "stored" else None)
            cache.attend(layer_id, torch.randn(batch, layer.query_heads, count, layer.key_dim, dtype=model.dtype))
        if not first:
            cache.finish_prefill()
    return cache


@pytest.mark.parametrize("layers", [LAYERS, PLAIN], ids=["mixed", "plain"])
@pytest.mark.parametrize(
    "composition",
    [
        "exact",
        "int8",
        "int4+page_size=32+tail_tokens=64",
        "keydiff+int4+page_size=16+tail_tokens=32@1/5",
        "pyramid+snapkv+int8@1/3",
        "h2o+page_size=16+tail_tokens=64@1/4",
        "quest(pages=4,dense_layers=1)+int4",
        "int4_rotated",
    ],
)
def test_a_plan_counts_what_a_cache_holds(layers: tuple[pikv.LayerConfig, ...], composition: str) -> None:
    """To a hundredth: under a budget the pages that decoded tokens have pushed out are the difference."""
    model = pikv.ModelConfig.of(layers, dtype=torch.float16)
    runtime = pikv.runtime_from(parse(composition).names_for(model, TOKENS), model)
    held = filled(model, runtime, tokens=TOKENS, batch=1).stored_bytes()
    plan = CachePlan.of(model, runtime, tokens=TOKENS)
    assert plan.total == pytest.approx(held.total, rel=0.01)
    for part in ("pages", "tail", "indexes", "bases"):
        assert sum(getattr(layer, part) for layer in plan.stored) == pytest.approx(getattr(held, part), rel=0.01), part


def test_sequences_of_a_batch_add_up() -> None:
    """But for a basis that all of them share."""
    model = pikv.ModelConfig.of(LAYERS, dtype=torch.float16)
    runtime = pikv.runtime_from({"compressor": "int4_rotated", "tail_tokens": 32}, model)
    held = filled(model, runtime, tokens=300, batch=3).stored_bytes()
    assert CachePlan.of(model, runtime, tokens=300, batch=3).total == pytest.approx(held.total, rel=0.01)
