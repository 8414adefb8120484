"""Which of the scored pages are read: the newest and the best, written once for all page selectors."""

from __future__ import annotations

import torch
from torch import Tensor


def best_pages(scores: Tensor, counts: Tensor, pages: int) -> Tensor:
    """The columns of the pages to read, oldest first: int64 [sequences, kv_heads, min(pages, width)].

    scores: [sequences, kv_heads, width]. counts: int64 [sequences, kv_heads], how many pages each row has; the newest
    of them comes whatever its score. A row with fewer pages than are read is filled up with columns past its count.
    """
    column = torch.arange(scores.shape[-1], device=scores.device)
    last = counts.to(scores.device)[..., None] - 1
    scores = scores.clamp(max=torch.finfo(scores.dtype).max)  # infinite is the newest alone
    ranked = scores.masked_fill(column > last, -torch.inf).masked_fill(column == last, torch.inf)
    return ranked.topk(min(pages, scores.shape[-1]), dim=-1).indices.sort(dim=-1).values
