"""Which tokens leave: protected sets, order, ties and rounding, written once for all selectors."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor


@attrs.frozen(kw_only=True)
class Candidates:
    """The stored tokens of a layer as the eviction sees them: sealed pages leave whole, tail tokens one by one.

    scores [sequences, kv_heads, tokens]: pages first, page_size slots each, then the tail. present: bool of the same
    shape, the slots that hold a live token. protected: bool, the tokens that stay whatever their score.
    """

    scores: Tensor
    present: Tensor
    protected: Tensor
    pages: int
    page_size: int


def choose(candidates: Candidates, budget_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the best units of every row within its budget.

    budget_tokens: int64 [sequences, kv_heads]; a page weighs page_size however many of its slots are live, since that
    is what it occupies. A page's score is the mean of its live tokens' scores, and one that holds a protected token
    stays. Units leave from the lowest score up, older ones first where scores are equal, until the rest fits.

    Returns the kept pages, bool [sequences, kv_heads, pages], and the kept tail tokens, bool [.., tail tokens].
    """
    slots = candidates.pages * candidates.page_size
    shape = (candidates.pages, candidates.page_size)
    live = candidates.present[..., :slots].unflatten(-1, shape)
    scores = candidates.scores.double()
    sums = scores[..., :slots].unflatten(-1, shape).masked_fill(~live, 0.0).sum(-1)
    counts = live.sum(-1)
    page_scores = sums / counts.clamp(min=1)
    page_protected = (candidates.protected[..., :slots].unflatten(-1, shape) & live).any(-1)

    tail_present = candidates.present[..., slots:]
    present = torch.cat([counts > 0, tail_present], dim=-1)
    protected = torch.cat([page_protected, candidates.protected[..., slots:] & tail_present], dim=-1) & present
    ranked = torch.cat([page_scores, scores[..., slots:]], dim=-1)
    ranked = ranked.masked_fill(protected, torch.inf).masked_fill(~present, -torch.inf)
    weights = torch.full_like(ranked, 1, dtype=torch.int64)
    weights[..., : candidates.pages] = candidates.page_size
    weights = weights * present

    order = ranked.flip(-1).argsort(
        stable=True, dim=-1, descending=True
    )  # flipped: of equal scores the newest is first
    order = ranked.shape[-1] - 1 - order
    fits = weights.gather(-1, order).cumsum(-1) <= budget_tokens[..., None].to(ranked.device)
    kept = torch.zeros_like(present).scatter(-1, order, fits)
    kept = (kept | protected) & present
    return kept[..., : candidates.pages], kept[..., candidates.pages :]
