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


def check_attends_what_is_read(cache: PiKVCache, generator: torch.Generator, *, tolerance: float) -> None:
    """Fill layer 0 of an empty cache: `attend` equals attention over what `retrieve` gives, whatever is lost of it."""
    layer, newest = cache.model.layers[0], slice(0, 1)
    q = torch.randn(2, layer.query_heads, 150, layer.key_dim, generator=generator)
    k, v = (torch.randn(2, layer.kv_heads, 150, layer.key_dim, generator=generator) for _ in range(2))
    cache.update(0, 0, k, v)
    cache.finish_prefill()
    cache.update(0, 150, k[:, :, newest], v[:, :, newest])
    context = cache.retrieve(0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, newest], context.keys, context.values, enable_gqa=True
    )
    torch.testing.assert_close(cache.attend(0, q[:, :, newest]), expected, atol=tolerance, rtol=tolerance)
