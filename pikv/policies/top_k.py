"""Plain top-k routing."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.errors import InputError
from pikv.core.ports import Router, Routing


@final
@attrs.frozen
class TopK(Router):
    """The k most probable experts, weights renormalised to sum to 1. Source: Mixtral, arXiv 2401.04088, section 2.1."""

    def route(self, probabilities: Tensor, k: int) -> Routing:
        """See Router.route; probabilities [tokens, experts]."""
        if probabilities.dim() != 2 or not 1 <= k <= probabilities.shape[1]:
            raise InputError(
                f"probabilities must be [tokens, experts] with at least k = {k} experts, "
                f"got {list(probabilities.shape)}"
            )
        weights, experts = probabilities.topk(k, dim=-1)
        return Routing(experts, weights / weights.sum(-1, keepdim=True))
