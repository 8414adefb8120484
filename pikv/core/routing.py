"""Which experts the router chooses for the tokens of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv.core.config import ModelConfig
from pikv.core.errors import ConfigError, InputError
from pikv.core.ports.router import Router, Routing
from pikv.core.ports.sharding import ExpertSharding
from pikv.core.runtime import RuntimeConfig


def choose(model: ModelConfig, runtime: RuntimeConfig, probabilities: Tensor, *, batch: int, tokens: int) -> Routing:
    """Route probabilities [batch, tokens, experts]; raises as PiKVCache.route says."""
    router, experts, k = _needed(model, runtime)
    if probabilities.shape != (batch, tokens, experts):
        raise InputError(
            f"probabilities must be [batch, tokens of the last update, experts] = {[batch, tokens, experts]}, got "
            f"{list(probabilities.shape)}"
        )
    if isinstance(runtime.sharding, ExpertSharding):
        places = runtime.sharding.place_of_expert(experts, runtime.places)
    else:
        places = torch.arange(experts) * runtime.places // experts
    return router.route(router.start(experts, places.to(probabilities.device)), probabilities.flatten(0, 1), k)


def check(model: ModelConfig, runtime: RuntimeConfig) -> None:
    """Raise ConfigError without a router or experts."""
    _needed(model, runtime)


def _needed(model: ModelConfig, runtime: RuntimeConfig) -> tuple[Router, int, int]:
    if runtime.router is None or model.experts is None or model.experts_per_token is None:
        raise ConfigError("route needs a router in the runtime, and experts and experts_per_token in the model")
    return runtime.router, model.experts, model.experts_per_token
