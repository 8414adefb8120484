"""Budgets that fall from layer to layer."""

from __future__ import annotations

import math
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import Allocator
from pikv.core.rounding import apportion_along
from pikv.core.views import AllocationRequest
from pikv.policies.uniform import Uniform


@final
@attrs.frozen(kw_only=True)
class Pyramid(Allocator):
    """Give the first layers more than the last: C_i = C_1 - (i - 1) d. Source: PyramidKV, arXiv 2406.02069, section 3.

    C_i is for each KV head of layer i = 1..L, beyond the exact tail, which is the paper's observation window. With a
    mean b, the last layer gets C_L = b / beta and the first C_1 = 2b - C_L, as in the authors' code; d is not rounded
    down as it is there, since the sum would miss the budget. If C_1 is above every ceiling, or C_L below every floor,
    that end is held at the limit and the line is made flatter, as theirs is at the ceiling. Where limits differ
    between layers, shares are clamped and the others follow the line of another mean.

    beta: 1 is the same for all layers; the larger, the steeper.
    """

    beta: float = 20.0

    def __attrs_post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 1):
            raise ConfigError(f"beta must be at least 1, which is the same for all layers, got {self.beta!r}")

    def layers(self, request: AllocationRequest) -> Tensor:
        """On the line, in whole pages: of layers with the same heads and limits none gets more than one before it."""
        floor, ceiling = request.floor.sum(-1), request.ceiling.sum(-1)
        heads = (request.ceiling > 0).sum(-1).double()
        most = (ceiling / heads.clamp(min=1)).amax(-1)  # a head
        least = (floor / heads).masked_fill(heads == 0, torch.inf).amin(-1).minimum(most)
        side = torch.linspace(1, -1, heads.shape[-1], dtype=torch.float64, device=heads.device)

        def line(mean: Tensor) -> Tensor:
            rise = (mean * (1 - 1 / self.beta)).minimum(most[..., None] - mean).minimum(mean - least[..., None])
            return (mean[..., None] + rise[..., None] * side) * heads[..., None, :]

        return apportion_along(line, low=least, high=most, total=request.budget_pages, floor=floor, ceiling=ceiling)

    def heads(self, request: AllocationRequest, layer_id: int, pages: Tensor, scores: Tensor | None) -> Tensor:
        """The same for all heads, as Uniform has it."""
        return Uniform().heads(request, layer_id, pages, scores)
