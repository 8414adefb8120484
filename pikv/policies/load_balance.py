"""Top-k routing that evens out how many tokens experts get."""

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
class BiasState(RouterState):
    """bias: float64 [experts], what is added to log p_e."""

    bias: Tensor


@final
@attrs.frozen(kw_only=True)
class LoadBalance(Router):
    """The k experts with the highest log p_e + bias_e, where the bias of busy experts falls. Source: arXiv 2408.15664.

    After each step that counted its load, the bias of an expert with more tokens than the mean falls by `rate`, and
    that of one with fewer rises by it (algorithm 1 there, auxiliary-loss-free balancing as in DeepSeek-V3); theirs is
    added to affinities between 0 and 1, here to log probabilities, as everywhere in PiKV. Weights are the gate's own.
    With a rate of 0 this is TopK, to the bit.
    """

    rate: float = 0.01

    def __attrs_post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise ConfigError(f"rate must be a number of at least 0, got {self.rate!r}; 0 routes as TopK does")

    def start(self, experts: int, places: Tensor) -> BiasState:
        """No expert is preferred."""
        return BiasState(places=check_places(experts, places), bias=torch.zeros_like(places, dtype=torch.float64))

    def route(self, state: RouterState, probabilities: Tensor, k: int) -> Routing:
        """The k highest scores."""
        check_routing(state, probabilities, k)
        scores = probabilities
        if self.rate > 0:  # logarithms would make ties of probabilities that are next to each other
            scores = probabilities.double().log() + _known(state).bias.to(probabilities.device)
        return Routing.to(scores.topk(k, dim=-1).indices, probabilities)

    def observe(self, state: RouterState, seen: Observation) -> BiasState:
        """Biases go a step towards the mean."""
        check_counts(state, "load", seen.load)
        known = _known(state)
        if not len(seen.load):
            return known
        load = seen.load.to(known.bias)
        return attrs.evolve(known, bias=known.bias + self.rate * (load.mean() - load).sign())


def _known(state: RouterState) -> BiasState:
    if not isinstance(state, BiasState):
        raise InputError(f"state must come from LoadBalance.start, got a {type(state).__name__}")
    return state
