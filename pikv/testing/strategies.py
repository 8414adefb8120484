"""Hypothesis strategies: models, compositions, chunkings, and positions with padding and jumps."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from pikv.core.config import DTYPES, LayerConfig, ModelConfig
from pikv.core.runtime import PAGE_SIZES, RuntimeConfig

_DIMS = (1, 3, 8, 16, 20)
_PADDED = ("none", "none", "left", "right", "middle", "scattered", "all")


@st.composite
def layer_configs(draw: DrawFn, *, windows: bool = True) -> LayerConfig:
    """A small layer: grouped queries, key and value dims that differ, scales, softcaps, sink logits, windows."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    key_dim = draw(st.sampled_from(_DIMS))
    logits = st.lists(st.floats(-3, 3), min_size=kv_heads * group, max_size=kv_heads * group)
    return LayerConfig(
        query_heads=kv_heads * group,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=draw(st.sampled_from(_DIMS)),
        scale=draw(st.sampled_from([key_dim**-0.5, 1.0, 0.1])),
        window=draw(st.none() | st.integers(1, 100)) if windows else None,
        softcap=draw(st.none() | st.sampled_from([0.5, 5.0, 30.0])),
        sinks=draw(st.none() | logits),
    )


@st.composite
def model_configs(
    draw: DrawFn, *, max_layers: int = 2, dtypes: tuple[torch.dtype, ...] = DTYPES, windows: bool = True
) -> ModelConfig:
    """A model on the CPU of layers that may differ."""
    layers = draw(st.lists(layer_configs(windows=windows), min_size=1, max_size=max_layers))
    return ModelConfig.of(layers, dtype=draw(st.sampled_from(dtypes)))


@st.composite
def runtime_configs(draw: DrawFn) -> RuntimeConfig:
    """The default composition with any page size and a short tail, so that short sequences seal pages."""
    return RuntimeConfig(page_size=draw(st.sampled_from(PAGE_SIZES)), tail_tokens=draw(st.integers(1, 70)))


@st.composite
def chunkings(draw: DrawFn, total: int, *, max_chunks: int = 6) -> list[int]:
    """The sizes of consecutive chunks of `total` tokens, empty ones among them."""
    cuts = draw(st.lists(st.integers(0, total), max_size=max_chunks - 1).map(sorted))
    bounds = [0, *cuts, total]
    return [stop - start for start, stop in pairwise(bounds)]


@st.composite
def positions(draw: DrawFn, batch: int, tokens: int, *, after: Tensor | None = None) -> Tensor:
    """Positions int64 [batch, tokens]: increasing, here and there with a jump, below 0 where a token is padding.

    after: int64 [batch], the newest position that each sequence has had; -1 before any, as by default.
    """
    newest = torch.full((batch,), -1) if after is None else after
    return torch.stack([_row(draw, tokens, int(last)) for last in newest])


def _row(draw: DrawFn, tokens: int, last: int) -> Tensor:
    stored = _stored(draw, tokens)
    steps = torch.ones(tokens, dtype=torch.int64)
    if tokens:
        steps[draw(st.integers(0, tokens - 1))] = draw(st.sampled_from([1, 1, 1, 2, 7, 40, 1000]))
    places = last + (steps * stored).cumsum(0)
    return torch.where(stored, places, draw(st.sampled_from([-1, -2 - places])))


def _stored(draw: DrawFn, tokens: int) -> Tensor:
    """Which tokens of a row are not padding: bool [tokens]."""
    style, index = draw(st.sampled_from(_PADDED)), torch.arange(tokens)
    if style == "none" or not tokens:
        return index >= 0
    if style == "all":
        return index < 0
    if style == "scattered":
        return index % draw(st.integers(2, 5)) != 0
    count = draw(st.integers(1, tokens))
    start = {"left": 0, "right": tokens - count, "middle": (tokens - count) // 2}[style]
    return (index < start) | (index >= start + count)


def generators() -> SearchStrategy[torch.Generator]:
    """Sources of random tensors, each from a seed."""
    return st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))
