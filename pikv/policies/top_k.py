"""Plain top-k routing."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports import Observation, Router, RouterState, Routing
from pikv.core.ports.router import check_places, check_routing


@final
@attrs.frozen
class TopK(Router):
    """The k most probable experts, weights renormalised to sum to 1. Source: Mixtral, arXiv 2401.04088, section 2.1."""

    def start(self, experts: int, places: Tensor) -> RouterState:
        """Nothing but the places."""
        return RouterState(places=check_places(experts, places))

    def route(self, state: RouterState, probabilities: Tensor, k: int) -> Routing:
        """The k most probable."""
        check_routing(state, probabilities, k)
        return Routing.to(probabilities.topk(k, dim=-1).indices, probabilities)

    def observe(self, state: RouterState, seen: Observation) -> RouterState:
        """Nothing is learnt."""
        return state
