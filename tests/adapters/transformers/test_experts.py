"""A router sees the model's own experts."""

from __future__ import annotations

import pytest
import torch

import pikv
from pikv.adapters.transformers import attach
from pikv.testing.transformers.models import cache_argument


def test_top_k_names_the_experts_that_computed(family_model, prompt):
    """In every layer with experts, for the tokens of the last call, the heaviest first."""
    experts = [
        module
        for layer in family_model.base_model.layers
        for name, module in layer.named_modules()
        if name.endswith(".experts")
    ]
    if not experts:
        with pytest.raises(pikv.ConfigError, match="no experts whose routing can be seen"):
            attach(family_model, {"router": "top_k"})
        return
    used = []
    hooks = [each.register_forward_pre_hook(lambda _, args: used.append(args[1:3])) for each in experts]
    with attach(family_model, {"router": "top_k"}) as host, torch.no_grad():
        cache = host.new_cache()
        family_model(input_ids=prompt[0], **{cache_argument(family_model): cache})
    for hook in hooks:
        hook.remove()
    assert len(cache.routed) == len(experts)
    for routing, (chosen, weights) in zip(cache.routed.values(), used, strict=True):
        assert torch.equal(routing.experts.sort(dim=-1).values, chosen.sort(dim=-1).values)
        heaviest = weights.sort(dim=-1, descending=True).values
        torch.testing.assert_close(routing.weights, heaviest / heaviest.sum(-1, keepdim=True))
        assert torch.equal(routing.home, routing.experts[:, 0])


def test_without_a_router_nothing_is_observed(mixtral, prompt):
    """No hook, no routing."""
    with attach(mixtral) as host, torch.no_grad():
        cache = host.new_cache()
        mixtral(input_ids=prompt[0], **{cache_argument(mixtral): cache})
    assert cache.routed == {}
