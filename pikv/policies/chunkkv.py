"""Whole stretches of text stay."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports import QueryTokenSelector, SharingTokenSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class ChunkKV(QueryTokenSelector, SharingTokenSelector):
    """Keep whole chunks of tokens by the attention that they get. Source: ChunkKV, arXiv 2502.00299, algorithm 1.

    A chunk is `chunk` neighbouring positions; its score is the mean, over its stored tokens in all KV heads of the
    layer, of the attention that the last `window` queries give, so every head keeps the same chunks. Of equal scores
    the newer tokens stay, so a budget cuts one chunk in two. Of `layers_a_choice` neighbouring layers the first
    chooses, and the others keep the same tokens (the paper's layer-wise index reuse): they score nothing and keep no
    queries. With 1 each layer chooses for itself.
    """

    chunk: int = attrs.field(default=10, validator=at_least(1))
    window: int = attrs.field(default=16, validator=at_least(1))
    sinks: int = attrs.field(default=4, validator=at_least(0))
    recent: int = attrs.field(default=16, validator=at_least(0))
    layers_a_choice: int = attrs.field(default=1, validator=at_least(1))

    def leader(self, layer_id: int) -> int:
        """The first of its neighbours."""
        return layer_id - layer_id % self.layers_a_choice

    def score(self, view: TokenView) -> Tensor:
        """The chunk's score for each of its tokens: [sequences, kv_heads, tokens]."""
        mass = view.mass()
        if not mass.shape[-1]:
            return mass
        present = view.positions >= 0
        of_chunk = (view.positions.long() // self.chunk).masked_fill(~present, 0).flatten(1)
        sums = mass.new_zeros(len(mass), int(of_chunk.max()) + 1)
        counts = sums.scatter_add(1, of_chunk, present.flatten(1).to(mass.dtype))
        sums = sums.scatter_add(1, of_chunk, mass.masked_fill(~present, 0.0).flatten(1))
        return (sums / counts.clamp(min=1)).gather(1, of_chunk).view_as(mass)
