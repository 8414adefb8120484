"""Which experts a model's own gates choose: seen where they are handed to the experts, the same in every family."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pikv.adapters.transformers.attention import STEP
from pikv.adapters.transformers.step import Step
from pikv.core.errors import ConfigError

_step: ContextVar[Step | None] = ContextVar("step", default=None)
"""Of the decoder layer that is running in this thread."""


def observe(model: Any) -> list[RemovableHandle]:
    """Hook all layers that have experts: their routing is handed to the step of the call that they are part of.

    Raises ConfigError if there is none whose routing can be seen.
    """
    hooks: list[RemovableHandle] = []
    for layer_id, layer in enumerate(model.base_model.layers):
        experts = next((each for name, each in layer.named_modules() if name.endswith(".experts")), None)
        if experts is not None:
            hooks += _observe(layer_id, layer, experts)
    if not hooks:
        raise ConfigError(
            f"a router was composed, and {type(model).__name__} has no experts whose routing can be seen in this "
            "version of transformers; leave the router out"
        )
    return hooks


def _observe(layer_id: int, layer: nn.Module, experts: nn.Module) -> list[RemovableHandle]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _step.set(kwargs.get(STEP))

    def choose(_: nn.Module, args: tuple[Any, ...]) -> None:
        if (step := _step.get()) is not None:
            step.route(layer_id, spread(args[1], args[2].detach(), step.cache.model.experts))

    def leave(*_: Any) -> None:
        _step.set(None)

    return [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        experts.register_forward_pre_hook(choose),
        layer.register_forward_hook(leave, always_call=True),
    ]


def spread(chosen: Tensor, weights: Tensor, experts: int | None) -> Tensor:
    """Weights [tokens, k] of the chosen experts as a distribution over all, [tokens, experts]."""
    assert experts is not None  # a model without experts is not observed
    zeros = torch.zeros(len(chosen), experts, dtype=weights.dtype, device=weights.device)
    return zeros.scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
