"""The same for every layer and head."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.ports import Allocator
from pikv.core.rounding import apportion
from pikv.core.views import AllocationRequest


@final
@attrs.frozen
class Uniform(Allocator):
    """Give every layer the same for each of its heads: C_i = total / L."""

    def layers(self, request: AllocationRequest) -> Tensor:
        """In proportion to the heads that a layer has."""
        heads = (request.ceiling > 0).sum(-1).clamp(min=1)
        return apportion(heads, request.budget_pages, request.floor.sum(-1), request.ceiling.sum(-1))

    def heads(self, request: AllocationRequest, layer_id: int, pages: Tensor, scores: Tensor | None) -> Tensor:
        """The same for all heads; what does not divide goes to the first ones."""
        floor, ceiling = request.floor[:, layer_id], request.ceiling[:, layer_id]
        return apportion(torch.ones_like(ceiling), pages, floor, ceiling)
