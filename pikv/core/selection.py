"""Which of the pages are read: the newest and the best, as many as wanted. Written once for all page selectors."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv.core.attention import finite
from pikv.core.ports.backend import Choice


def best_pages(scores: Tensor, counts: Tensor, pages: int) -> Choice:
    """Choose each row's newest page, whatever its score, and those with the highest scores: `pages`, if there are.

    scores: [sequences, kv_heads, width]. counts: int64 [sequences, kv_heads], how many pages each row has.
    """
    ranked = _newest_first(scores, counts).topk(min(pages, scores.shape[-1]), dim=-1)
    return Choice(columns=ranked.indices.sort(dim=-1).values, reads=counts.clamp(max=pages))


def heaviest_pages(
    log_mass: Tensor, beside: Tensor, counts: Tensor, *, pages: int, mass: float | None, min_pages: int
) -> Choice:
    """Choose each row's newest page and those that get the most attention, on the mean of the group.

    log_mass: [sequences, kv_heads, group, width], see MassSelector; beside: see ChooseKernel. At least min_pages and at
    most `pages`; between them, with a mass, as few as leave out no more than 1 - mass.
    """
    width = log_mass.shape[-1]
    present = torch.arange(width, device=log_mass.device) < counts.to(log_mass.device)[..., None]
    log_mass = log_mass.float().masked_fill(~present[:, :, None], -torch.inf)
    total = finite(torch.logaddexp(log_mass.logsumexp(-1), beside))
    shares = torch.exp(log_mass - total[..., None]).mean(2)
    columns = _newest_first(shares, counts).topk(min(pages, width), dim=-1).indices  # the first to be read first
    left_out = (shares.sum(-1, keepdim=True) - shares.gather(-1, columns).cumsum(-1)).clamp(min=0)  # after each
    reads = counts.to(columns.device).clamp(max=pages)
    if mass is not None:
        enough = 1 + (left_out > 1 - mass).sum(-1)
        reads = torch.minimum(enough.clamp(min=min_pages), reads)
    unread = torch.arange(columns.shape[-1], device=columns.device) >= reads[..., None]
    return Choice(
        columns=columns.masked_fill(unread, width).sort(dim=-1).values.clamp(max=width - 1),
        reads=reads,
        left_out=left_out.gather(-1, (reads - 1).clamp(min=0)[..., None])[..., 0],
    )


def _newest_first(scores: Tensor, counts: Tensor) -> Tensor:
    """The scores with infinity for each row's newest page alone, and minus infinity past its last one."""
    column = torch.arange(scores.shape[-1], device=scores.device)
    last = counts.to(scores.device)[..., None] - 1
    scores = scores.clamp(max=torch.finfo(scores.dtype).max)
    return scores.masked_fill(column > last, -torch.inf).masked_fill(column == last, torch.inf)
