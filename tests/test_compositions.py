"""A composition in one line of text says what `runtime_from` is given, and what a share of bytes amounts to."""

from __future__ import annotations

import pytest
import torch

import pikv
from pikv.compositions import full_bytes, parse

MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=32, dtype=torch.float16)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("exact", {"compressor": "exact"}),
        ("int4", {"compressor": "int4"}),
        (
            "quest(pages=8, dense_layers=0)+int8",
            {"page_selector": {"name": "quest", "pages": 8, "dense_layers": 0}, "compressor": "int8"},
        ),
        ("pyramid+snapkv+page_size=16", {"allocator": "pyramid", "token_selector": "snapkv", "page_size": 16}),
        (
            "recent+adakv(across=pyramid)",
            {"token_selector": "recent", "allocator": {"name": "adakv", "across": "pyramid"}},
        ),
    ],
)
def test_read(text, names):
    """Each part under its kind, settings beside its name."""
    composition = parse(text)
    assert composition.names == names
    assert composition.share is None
    assert composition.text == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int4+int8",
        "4bits",
        "quest(8)",
        "snapkv@",
        "snapkv@2",
        "snapkv@0",
        "snapkv@1/0",
        "page_size=x+",
        "int4-int8",
    ],
)
def test_what_cannot_be_read(text):
    """Is refused with what was expected."""
    with pytest.raises(pikv.ConfigError):
        parse(text)


def test_a_part_that_is_not_known():
    """Is refused with those that are."""
    with pytest.raises(pikv.UnknownNameError, match="snapkv"):
        parse("snapvk")


@pytest.mark.parametrize(
    "text", ["snapkv(window=16)+int4@1/10", "recent(recent=16)@0.25", "keydiff(recent=16)+int2@1/20"]
)
def test_a_share_is_kept_by_the_cache(text):
    """The sealed pages of a cache take the share of the full cache's bytes, less than a page a row below it."""
    tokens, composition = 2048, parse(text.replace("@", "+page_size=16+tail_tokens=32@"))
    cache = pikv.PiKVCache(MODEL, pikv.runtime_from(composition.names_for(MODEL, tokens), MODEL))
    keys, values = torch.randn(2, 1, 2, tokens, 32, dtype=torch.float16)
    for layer_id in range(2):
        cache.update(layer_id, 0, keys, values)
        cache.attend(layer_id, torch.randn(1, 4, tokens, 32, dtype=torch.float16))
    cache.finish_prefill()
    full = 2 * (keys.nbytes + values.nbytes)
    page = cache.pool.slab(cache._served[0].codec.form).stride(0)
    assert composition.share is not None
    most = float(composition.share) * full
    assert most - 4 * page <= cache.stored_bytes().pages <= most


def test_a_share_beside_a_budget():
    """Says the same thing twice."""
    with pytest.raises(pikv.ConfigError, match="leave one out"):
        parse("recent+budget_tokens=512@1/10").names_for(MODEL, 2048)


def test_a_share_is_of_what_a_full_cache_would_hold():
    """Where a layer slides, that is its window; where values are a part of the keys, it is the keys."""
    heads = {"query_heads": 4, "kv_heads": 2, "key_dim": 32, "value_dim": 16}
    stored, slides = pikv.LayerConfig(**heads), pikv.LayerConfig(**heads, window=100)
    latent = pikv.LayerConfig(**heads, values="key_prefix")
    model = pikv.ModelConfig.of([stored, slides, latent], dtype=torch.float16)
    assert full_bytes(model, 1000) == 2 * 2 * (48 * 1000 + 48 * 100 + 32 * 1000)
