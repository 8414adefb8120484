"""The load-balance loss of experts, over all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def load_balance(router: Sequence[Tensor], mask: Tensor, *, per_token: int) -> Tensor:
    """E * sum_e f_e P_e over the tokens of all layers: f_e the share sent to expert e, P_e its mean probability.

    router: of each layer, [batch * tokens, experts], logits or what some families call so, probabilities. mask:
    [batch, tokens], 0 for padding. per_token: experts that a token goes to, which is also the loss of an even load.

    Counts are summed over processes. Each process returns its own tokens' share of the loss, so that the sum over
    processes is the loss of the whole batch, and so are gradients. Source: Switch Transformers, arXiv 2101.03961,
    equation 4, as transformers has it.
    """
    scores = torch.stack([layer.float() for layer in router])  # [layers, batch * tokens, experts]
    probabilities = scores if _are_probabilities(scores) else scores.softmax(-1)
    kept = mask.flatten().to(probabilities.dtype)
    experts = probabilities.shape[-1]
    chosen = F.one_hot(probabilities.topk(per_token).indices, experts).sum(-2).to(probabilities.dtype)
    counts = torch.cat([torch.einsum("lte,t->e", chosen, kept), kept.sum()[None] * len(router)])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    tokens = counts[-1]
    return experts * (counts[:-1] / tokens * torch.einsum("lte,t->e", probabilities, kept) / tokens).sum()


def _are_probabilities(scores: Tensor) -> bool:
    with torch.no_grad():
        return bool((scores >= 0).all() and (scores.sum(-1) - 1).abs().max() < 1e-3)
