"""Top-k routing that avoids shards whose pages are far."""

from __future__ import annotations

import math
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError, InputError
from pikv.core.ports import Observation, Router, RouterState, Routing
from pikv.core.ports.router import check_counts, check_places, check_routing


@final
@attrs.frozen(kw_only=True, eq=False)
class MissState(RouterState):
    """misses: int64 [experts], the pages of each expert's shard that a query would have to fetch, as last counted."""

    misses: Tensor


@final
@attrs.frozen(kw_only=True)
class CacheAware(Router):
    """The k experts with the highest log p_e - lambda * log(1 + misses_e). Source: PiKV, arXiv 2508.06526.

    As in LatencyAware, log p_e stands for the gate's logit, and the weights are the gate's own probabilities.
    misses_e: pages of e's shard that would have to be fetched for this query, as the last observation counted them;
    0 before any did. strength: lambda, so 1 makes a shard with one page missing half as likely; with 0 this is TopK, to
    the bit.
    """

    strength: float = 1.0

    def __attrs_post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ConfigError(f"strength must be a number of at least 0, got {self.strength!r}; 0 routes as TopK does")

    def start(self, experts: int, places: Tensor) -> MissState:
        """Nothing is missing."""
        return MissState(places=check_places(experts, places), misses=torch.zeros_like(places))

    def route(self, state: RouterState, probabilities: Tensor, k: int) -> Routing:
        """The k highest scores."""
        check_routing(state, probabilities, k)
        scores = probabilities
        if self.strength > 0:  # logarithms would make ties of probabilities that are next to each other
            misses = _known(state).misses.to(probabilities.device).double()
            scores = probabilities.double().log() - self.strength * misses.log1p()
        return Routing.to(scores.topk(k, dim=-1).indices, probabilities)

    def observe(self, state: RouterState, seen: Observation) -> MissState:
        """The newest count, if there is one."""
        check_counts(state, "misses", seen.misses)
        known = _known(state)
        return attrs.evolve(known, misses=seen.misses.to(known.misses)) if len(seen.misses) else known


def _known(state: RouterState) -> MissState:
    if not isinstance(state, MissState):
        raise InputError(f"state must come from CacheAware.start, got a {type(state).__name__}")
    return state
