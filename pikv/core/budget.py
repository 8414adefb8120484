"""How many tokens each layer and head may keep right now, from the budget, the allocator and what exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core.views import AllocationRequest

if TYPE_CHECKING:
    from pikv.core.config import ModelConfig
    from pikv.core.ports import Allocator


@attrs.frozen(kw_only=True)
class Budget:
    """A mean of budget_tokens for each layer and KV head, shared out in whole pages by the allocator.

    What exceeds whole pages beyond tail_tokens stays in the tail.
    """

    model: ModelConfig
    allocator: Allocator
    budget_tokens: int
    tail_tokens: int
    page_size: int
    sinks: int

    def tokens(self, layer_id: int, seen: Tensor, scores: Tensor | None = None) -> Tensor:
        """The tokens that each row of a layer may keep: int64 [sequences, kv_heads].

        seen: int64 [sequences], the tokens offered so far. A row never needs more pages than hold what it has seen;
        what it leaves goes to the others, where the allocator says.
        """
        in_tail = self.tail_tokens + (self.budget_tokens - self.tail_tokens) % self.page_size
        request = self._request(seen, in_tail)
        pages = self.allocator.layers(request)[:, layer_id]
        heads = self.allocator.heads(request, layer_id, pages, scores)
        return heads[:, : self.model.layers[layer_id].kv_heads] * self.page_size + in_tail

    def _request(self, seen: Tensor, in_tail: int) -> AllocationRequest:
        heads = [layer.kv_heads for layer in self.model.layers]
        widest = max(heads)
        exists = torch.tensor([head < count for count in heads for head in range(widest)]).view(len(heads), widest)
        windows = torch.tensor([layer.window or torch.iinfo(torch.int64).max for layer in self.model.layers])
        beyond = (torch.minimum(seen[:, None], windows) - in_tail).clamp(min=0)  # [sequences, layers]
        ceiling = (-(-beyond // self.page_size))[..., None] * exists
        floor = ceiling.clamp(max=-(-self.sinks // self.page_size))
        total = (self.budget_tokens - in_tail) // self.page_size * sum(heads)
        return AllocationRequest(
            budget_pages=torch.full_like(seen, total), floor=floor, ceiling=ceiling, page_size=self.page_size
        )
