"""Top-k routing that avoids slow places."""

from __future__ import annotations

import math
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError, InputError
from pikv.core.ports import Observation, Router, RouterState, Routing
from pikv.core.ports.router import check_places, check_routing


@final
@attrs.frozen(kw_only=True, eq=False)
class LatencyState(RouterState):
    """seconds_per_token: float64 [places], averaged over the steps so far; NaN for a place not measured yet."""

    seconds_per_token: Tensor


@final
@attrs.frozen(kw_only=True)
class LatencyAware(Router):
    """The k experts with the highest log p_e - lambda * latency_e, weighted by the gate's own probabilities.

    The paper's score has the gate's logits; probabilities are softmaxed already, in transformers too, and log p_e is
    the logit up to a number that is the same for all experts of a token. Source: PiKV, arXiv 2508.06526.

    latency_e: milliseconds per token of the place that holds expert e, an exponentially weighted moving average of what
    was observed; a place that was never observed counts as the mean of those that were, or 0 if none was. A place that
    gets no tokens keeps the latency it had.
    strength: the paper's lambda, in nats per millisecond per token; with 0 this is TopK, to the bit. smoothing: the
    weight of the newest observation in the average, above 0 and at most 1. most_change: the factor, above 1, by which
    one observation may change an average at most, so that one that was an accident does not send everything elsewhere;
    None for any.
    """

    strength: float = 1.0
    smoothing: float = 0.1
    most_change: float | None = None

    def __attrs_post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ConfigError(f"strength must be a number of at least 0, got {self.strength!r}; 0 routes as TopK does")
        if not 0 < self.smoothing <= 1:
            raise ConfigError(
                f"smoothing must be above 0 and at most 1, got {self.smoothing!r}; 1 forgets all but the newest"
            )

        if self.most_change is not None and not self.most_change > 1:
            raise ConfigError(f"most_change must be a factor above 1, or None for any, got {self.most_change!r}")

    def start(self, experts: int, places: Tensor) -> LatencyState:
        """No place is measured."""
        last = RouterState(places=check_places(experts, places)).places.max()
        unknown = torch.full((int(last) + 1,), torch.nan, dtype=torch.float64, device=places.device)
        return LatencyState(places=places, seconds_per_token=unknown)

    def route(self, state: RouterState, probabilities: Tensor, k: int) -> Routing:
        """The k highest scores."""
        check_routing(state, probabilities, k)
        scores = probabilities
        if self.strength > 0:  # logarithms would make ties of probabilities that are next to each other
            scores = probabilities.double().log() - self.strength * _milliseconds(state).to(probabilities.device)
        return Routing.to(scores.topk(k, dim=-1).indices, probabilities)

    def observe(self, state: RouterState, seen: Observation) -> LatencyState:
        """Average in the places that computed something."""
        before = _known(state).seconds_per_token
        if len(seen.tokens) < len(before):
            raise InputError(f"seen must have all {len(before)} places that hold experts, got {len(seen.tokens)}")
        tokens, seconds = (numbers[: len(before)].to(before) for numbers in (seen.tokens, seen.seconds))
        now = seconds / tokens
        averaged = torch.lerp(before, now, self.smoothing)
        if self.most_change is not None:
            bounded = averaged.clamp(before / self.most_change, before * self.most_change)
            averaged = torch.where(before > 0, bounded, averaged)
        after = torch.where(before.isnan(), now, averaged)
        return attrs.evolve(_known(state), seconds_per_token=torch.where(tokens > 0, after, before))


def _known(state: RouterState) -> LatencyState:
    if not isinstance(state, LatencyState):
        raise InputError(f"state must come from LatencyAware.start, got a {type(state).__name__}")
    return state


def _milliseconds(state: RouterState) -> Tensor:
    """The latency of each expert, [experts]."""
    known = _known(state).seconds_per_token * 1e3
    typical = known.nanmean().nan_to_num()
    return torch.where(known.isnan(), typical, known)[state.places]
