"""Layers whose values are a prefix of their keys: the same answers as layers that store them, in fewer bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.testing import strategies as some

SIZES = {"query_heads": 4, "kv_heads": 2, "key_dim": 12, "value_dim": 8}
LATENT = pikv.ModelConfig.of([pikv.LayerConfig(**SIZES, values="key_prefix")])
STORED = pikv.ModelConfig.of([pikv.LayerConfig(**SIZES)])


@pytest.mark.property
@given(runtime=some.runtime_configs(), data=st.data(), generator=some.generators())
def test_answers_are_those_of_stored_values(runtime, data, generator):
    """Prompt, chunks, decoding, padding, forks, crops and joins: `attend` and `retrieve` bit for bit."""
    latent, stored = pikv.PiKVCache(LATENT, runtime), pikv.PiKVCache(STORED, runtime)
    last, batch = torch.full((2,), -1), 2
    for _ in range(data.draw(st.integers(1, 5))):
        tokens = data.draw(st.integers(1, 90) | st.just(1))
        positions = data.draw(some.positions(batch, tokens, after=last))
        last = torch.maximum(last, positions.amax(-1))
        k, q = (torch.randn(batch, heads, tokens, 12, generator=generator) for heads in (2, 4))
        latent.update(0, positions, k, None)
        stored.update(0, positions, k, k[..., :8].contiguous())
        torch.testing.assert_close(latent.attend(0, q), stored.attend(0, q), atol=1e-6, rtol=1e-6)
        check_same(latent, stored)
    for cache in (latent, stored):
        cache.crop(max(1, int(last.max()) // 2))
        cache.join(cache.fork())
        cache.drop([1])
    check_same(latent, stored)
    assert latent.stored_bytes().total <= stored.stored_bytes().total


def check_same(latent, stored):
    ours, theirs = latent.retrieve(0), stored.retrieve(0)
    for name in ("keys", "values", "positions", "mask"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_values_take_no_bytes():
    """Of 12 + 8 channels 12 are stored, in pages and in the tail; positions and tables stay."""
    bytes_held = []
    for model, values in ((LATENT, 0), (STORED, 8)):
        cache = pikv.PiKVCache(model, pikv.RuntimeConfig(page_size=64, tail_tokens=64))
        k = torch.randn(1, 2, 192, 12)
        cache.update(0, 0, k, k[..., :8] if values else None)
        cache.finish_prefill()
        held = cache.stored_bytes()
        assert held.pages == 2 * 2 * 64 * 4 * (12 + values + 1)  # 2 heads, 2 pages, float32, and a position
        bytes_held.append(held.tail - 2 * 8)  # lengths
    assert bytes_held[0] * (12 + 8 + 1) == bytes_held[1] * (12 + 1)


def test_a_decoded_token_may_come_without_a_batch():
    """[kv_heads, key_dim], as with stored values."""
    cache = pikv.PiKVCache(LATENT)
    key = torch.randn(2, 12)
    cache.update(0, 0, key, None)
    assert torch.equal(cache.retrieve(0).values[0, :, 0], key[:, :8])


def test_values_beside_keys_that_hold_them_are_refused():
    """They would be ignored; nothing is stored."""
    cache, k = pikv.PiKVCache(LATENT), torch.ones(1, 2, 3, 12)
    with pytest.raises(pikv.InputError, match=r"v of layer 0 must be None.*key_prefix, got Tensor"):
        cache.update(0, 0, k, k[..., :8])
    assert cache.sequences == 0
