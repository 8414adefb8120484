"""Top-k routing to few places."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.ports import Observation, Router, RouterState, Routing
from pikv.core.ports.router import check_places, check_routing
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class GroupLimited(Router):
    """The k most probable experts of the few best groups, so that a token is dispatched to few places.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (node-limited routing). A group is the experts of one place; it
    is ranked by the sum of its `best` highest probabilities. The first `groups` are looked at, and as many more as
    hold k experts.
    """

    groups: int = attrs.field(default=4, validator=at_least(1))
    best: int = attrs.field(default=2, validator=at_least(1))

    def start(self, experts: int, places: Tensor) -> RouterState:
        """Nothing but the places."""
        return RouterState(places=check_places(experts, places))

    def route(self, state: RouterState, probabilities: Tensor, k: int) -> Routing:
        """The k most probable within the groups."""
        check_routing(state, probabilities, k)
        places = state.places.to(probabilities.device)
        held = places == torch.arange(int(places.max()) + 1, device=places.device)[:, None]  # [groups, experts]
        of_group = probabilities[:, None].masked_fill(~held, -1.0)
        best = of_group.topk(min(self.best, state.experts), dim=-1).values.clamp(min=0).sum(-1)
        order = best.masked_fill(~held.any(-1), -1.0).argsort(dim=-1, descending=True, stable=True)
        sizes = held.sum(-1)[order]
        before = sizes.cumsum(-1) - sizes  # experts of better groups
        looked_at = (torch.arange(len(held), device=places.device) < self.groups) | (before < k)
        allowed = torch.zeros_like(looked_at).scatter(1, order, looked_at)[:, places]  # [tokens, experts]
        return Routing.to(probabilities.masked_fill(~allowed, -1.0).topk(k, dim=-1).indices, probabilities)

    def observe(self, state: RouterState, seen: Observation) -> RouterState:
        """Nothing is learnt."""
        return state
