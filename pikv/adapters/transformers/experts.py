"""Which experts a model's own gates choose: seen where they are handed to the experts, the same in every family."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pikv.adapters.transformers.attention import STEP
from pikv.adapters.transformers.step import Step
from pikv.core.errors import ConfigError


@attrs.define
class GateObserver:
    """Hooks that hand a layer's routing to the step of the call that it is part of. Two threads do not meet."""

    hooks: list[RemovableHandle] = attrs.field(factory=list)
    _step: ContextVar[Step | None] = attrs.field(factory=lambda: ContextVar("step", default=None))

    @classmethod
    def of(cls, model: Any) -> GateObserver:
        """Observe all layers that have experts. Raises ConfigError if none has any that can be seen."""
        observer = cls()
        for layer_id, layer in enumerate(model.base_model.layers):
            experts = next((each for name, each in layer.named_modules() if name.endswith(".experts")), None)
            if experts is not None:
                observer.hooks += observer._observe(layer_id, layer, experts)
        if not observer.hooks:
            raise ConfigError(
                f"a router was composed, and {type(model).__name__} has no experts whose routing can be seen in this "
                "version of transformers; leave the router out"
            )
        return observer

    def _observe(self, layer_id: int, layer: nn.Module, experts: nn.Module) -> list[RemovableHandle]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._step.set(kwargs.get(STEP))

        def choose(_: nn.Module, args: tuple[Any, ...]) -> None:
            if (step := self._step.get()) is not None:
                step.route(layer_id, spread(args[1], args[2].detach(), step.cache.model.experts))

        return [layer.register_forward_pre_hook(enter, with_kwargs=True), experts.register_forward_pre_hook(choose)]


def spread(chosen: Tensor, weights: Tensor, experts: int | None) -> Tensor:
    """Weights [tokens, k] of the chosen experts as a distribution over all, [tokens, experts]."""
    assert experts is not None  # a model without experts is not observed
    zeros = torch.zeros(len(chosen), experts, dtype=weights.dtype, device=weights.device)
    return zeros.scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
