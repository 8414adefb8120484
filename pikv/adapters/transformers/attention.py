"""The one thing registered with transformers: an attention that asks the cache of the call which it is part of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pikv.adapters.transformers.step import Step
from pikv.core.errors import InputError, StateError

NAME = "pikv"
STEP = "pikv_step"  # the keyword by which a call's step travels through the model down to its attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do: [batch, heads, tokens, dim] in, [batch, tokens, heads, dim] out.

    With a step among the keywords the keys and values are the cache's own; without one (training, or another cache)
    this is transformers' SDPA.
    """
    step: Step | None = kwargs.pop(STEP, None)
    if step is None:
        if softcap is not None or kwargs.get("s_aux") is not None:
            raise StateError(
                "this model's attention has sink logits or a softcap, which SDPA lacks, so with PiKV attached it needs "
                "a cache that host.new_cache() made; for calls without one, host.detach() first"
            )
        return sdpa_attention_forward(  # type: ignore[no-any-return]  # transformers is not typed strictly
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise InputError(f"attention dropout must be 0 with a PiKV cache, got {dropout}; call model.eval() first")
    output = step.attend(module, query, scale=scaling, softcap=softcap)
    if torch.is_grad_enabled() and query.requires_grad:
        output = _NoGradient.apply(output, query)
    return output.transpose(1, 2).contiguous(), None


class _NoGradient(torch.autograd.Function):
    """Makes a backward pass through a cache an error; it would leave out all gradients of keys and values."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise StateError("a PiKV cache keeps numbers and no graph; train without a cache (use_cache=False)")


def register() -> None:
    """Make `set_attn_implementation(NAME)` known. Stateless, and the same however often it is called."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def no_mask() -> Tensor:
    """A prepared mask of no size: transformers passes a mask of four dimensions on as it is, and builds none."""
    return torch.empty(1, 1, 1, 0)
