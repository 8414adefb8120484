"""Top-k routing within the room that experts have."""

from __future__ import annotations

import math
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import Observation, Router, RouterState, Routing
from pikv.core.ports.router import check_places, check_routing


@final
@attrs.frozen(kw_only=True)
class Capacity(Router):
    """Each expert takes its most probable tokens of a step, and refuses others once it is full.

    An expert has room for ceil(factor * k * tokens / experts) tokens of a step (Switch Transformers, arXiv 2101.03961,
    section 2.2). There what does not fit is dropped; here it goes to the token's next best expert, as in deferred
    acceptance: tokens ask their best k, full experts refuse the least probable, and those ask on. A token is refused
    by no more than experts - k, so none is left out, and with a small factor an expert may have more than its room.
    A token's experts depend on the others of its step.
    """

    factor: float = 1.25

    def __attrs_post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ConfigError(f"factor must be at least 1, which is room for every token, got {self.factor!r}")

    def start(self, experts: int, places: Tensor) -> RouterState:
        """Nothing but the places."""
        return RouterState(places=check_places(experts, places))

    def route(self, state: RouterState, probabilities: Tensor, k: int) -> Routing:
        """The k most probable that have room."""
        check_routing(state, probabilities, k)
        tokens, experts = probabilities.shape
        room = math.ceil(self.factor * k * tokens / experts)
        refused = torch.zeros_like(probabilities, dtype=torch.bool)
        while True:
            chosen = probabilities.masked_fill(refused, -1.0).topk(k, dim=-1).indices
            asking = torch.zeros_like(refused).scatter_(1, chosen, True)
            may_refuse = refused.sum(-1, keepdim=True) < experts - k
            turned_away = _beyond(room, probabilities.masked_fill(~asking, -1.0)) & asking & may_refuse
            if not bool(turned_away.any()):
                return Routing.to(chosen, probabilities)
            refused |= turned_away

    def observe(self, state: RouterState, seen: Observation) -> RouterState:
        """Nothing is learnt."""
        return state


def _beyond(room: int, asking: Tensor) -> Tensor:
    """Whom each expert has no room for, bool [tokens, experts]: all but its `room` most probable tokens."""
    order = asking.argsort(dim=0, descending=True, stable=True)
    return order.argsort(dim=0) >= room
