"""More for the heads whose tokens score highest."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import Allocator, ScoreAllocator, TokenSelector
from pikv.core.rounding import apportion
from pikv.core.views import AllocationRequest
from pikv.policies.uniform import Uniform


@final
@attrs.frozen(kw_only=True)
class AdaKV(ScoreAllocator):
    """Split a layer among its heads by where its best tokens are. Source: AdaKV, arXiv 2407.11550, algorithm 1.

    With room for h * B tokens in a layer of h heads, beyond the exact tail, the h * B best of all heads together are
    counted in each: head i gets (1 - a) * count_i + a * B, in whole pages. a is the safeguard, 0.2 in the paper, 0.5
    in the authors' later code. What a head does not get is freed, not masked.

    across: how layers share the budget (Pyramid() makes Ada-PyramidKV). scored_by: whose scores are counted; None for
    those of the cache's token selector. They must compare between heads, as sums of attention do.
    """

    safeguard: float = 0.2
    across: Allocator = attrs.field(factory=Uniform)
    scored_by: TokenSelector | None = None

    def __attrs_post_init__(self) -> None:
        if not 0 < self.safeguard <= 1:
            raise ConfigError(
                f"safeguard must be above 0 and at most 1, which is the same for all heads, got {self.safeguard!r}"
            )

    def layers(self, request: AllocationRequest) -> Tensor:
        """As `across` has it."""
        return self.across.layers(request)

    def heads(self, request: AllocationRequest, layer_id: int, pages: Tensor, scores: Tensor | None) -> Tensor:
        """By the counts of the best; without scores the same for all."""
        floor, ceiling = request.floor[:, layer_id], request.ceiling[:, layer_id]
        if scores is None:
            return Uniform().heads(request, layer_id, pages, None)
        counts = _among_best(scores, pages * request.page_size, exists=ceiling[:, : scores.shape[1]] > 0)
        even = counts.sum(-1, keepdim=True) / (ceiling > 0).sum(-1, keepdim=True).clamp(min=1)
        weights = torch.full(ceiling.shape, 1e-6, dtype=torch.float64)  # apportion wants them positive
        weights[:, : scores.shape[1]] += (1 - self.safeguard) * counts + self.safeguard * even
        return apportion(weights, pages, floor, ceiling)


def _among_best(scores: Tensor, best: Tensor, *, exists: Tensor) -> Tensor:
    """How many of each sequence's `best` [sequences] highest scores are in each head: int64 [sequences, kv_heads]."""
    heads, tokens = scores.shape[1:]
    ranked = scores.cpu().masked_fill(~exists[..., None], -torch.inf).flatten(1).sort(stable=True, descending=True)
    among = (torch.arange(heads * tokens) < best[:, None]) & (ranked.values > -torch.inf)
    counts = torch.zeros(len(scores), heads, dtype=torch.int64)
    return counts.scatter_add(1, ranked.indices // max(1, tokens), among.long())
