"""Attention for many queries by torch's fused kernel, which holds no score matrix; the oracle where it cannot."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv.core import attention
from pikv.core.attention import Partial

# What scaled_dot_product_attention calls on a CPU. It also returns the log-sum-exp, which the public function keeps.
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(query: Tensor, softcap: float | None) -> bool:
    """Whether the kernel takes such queries."""
    return softcap is None and query.device.type == "cpu" and query.dtype in _DTYPES


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Partial:
    """As `attention.attend`, for [sequences, heads, queries, key_dim] and [sequences, heads, tokens, dim].

    mask: bool [sequences, heads or 1, queries or 1, tokens].

    For a half-precision query the softmax weights and the output are rounded to half precision, once each. What the
    kernel does not serve is left to the oracle, which holds a score of every query and token.
    """
    if not serves(query, softcap) or not query.numel() or not keys.shape[2]:
        return attention.attend(query, keys, values, scale=scale, softcap=softcap, mask=mask)
    if mask is None:
        return _run(query, keys, values, scale=scale)
    bias = query.new_zeros(mask.shape).masked_fill_(~mask, -math.inf)  # the kernel stretches sizes of 1 itself
    partial = _run(query, keys, values, scale=scale, bias=bias)
    return Partial(partial.output, partial.log_sum_exp.masked_fill(~mask.any(-1), -torch.inf))  # the kernel says 0


def attend_causal(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Partial:
    """Attention of new tokens to each other, each to itself and those before, where `serves` says so.

    query [sequences, kv_heads, group, tokens, key_dim], keys [sequences, kv_heads, tokens, key_dim] and values; the
    Partial has the shape [sequences, kv_heads, group, tokens, ...].
    """
    parts = [_run(each, keys, values, scale=scale, causal=True) for each in query.unbind(2)]  # keys are not repeated
    return Partial(
        torch.stack([part.output for part in parts], dim=2), torch.stack([part.log_sum_exp for part in parts], dim=2)
    )


def _run(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, bias: Tensor | None = None, causal: bool = False
) -> Partial:
    """The kernel wants one size of head, and channels side by side; all other strides may be anything."""
    width, value_dim = max(keys.shape[-1], values.shape[-1]), values.shape[-1]
    states = (_as_wide(each, width) for each in (query, keys.to(query.dtype), values.to(query.dtype)))
    output, log_sum_exp = _kernel(*states, is_causal=causal, attn_mask=bias, scale=scale)
    return Partial(output[..., :value_dim].float(), log_sum_exp)


def _as_wide(states: Tensor, width: int) -> Tensor:
    if states.shape[-1] < width:
        return F.pad(states, (0, width - states.shape[-1]))
    return states if states.stride(-1) == 1 else states.contiguous()
