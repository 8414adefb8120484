"""A cache with something in it, for tests of what becomes of it."""

from __future__ import annotations

import torch

from pikv.core.cache import PiKVCache


def filled(cache: PiKVCache, tokens: int) -> PiKVCache:
    """The cache after a prompt of so many random tokens, the same each time: one sequence, cut and sealed."""
    generator = torch.Generator().manual_seed(0)
    for layer_id, layer in enumerate(cache.model.layers):
        q = torch.randn(1, layer.query_heads, tokens, layer.key_dim, generator=generator)
        k, v = torch.randn(2, 1, layer.kv_heads, tokens, layer.key_dim, generator=generator)
        cache.update(layer_id, 0, k, v)
        cache.attend(layer_id, q)
    cache.finish_prefill()
    return cache
