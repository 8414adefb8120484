"""How many tokens each layer and head may keep right now, from the budget, the allocator and what exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core.views import AllocationRequest

if TYPE_CHECKING:
    from pikv.core.config import ModelConfig, RuntimeConfig
    from pikv.core.ports import Allocator


@attrs.define(kw_only=True)
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
    _shared_for: list[int] | None = attrs.field(default=None, init=False)
    _shares: list[Tensor] = attrs.field(factory=list, init=False)

    @classmethod
    def of(cls, model: ModelConfig, runtime: RuntimeConfig) -> Budget | None:
        """This place's share of the runtime's budget; None if it has none."""
        if runtime.budget_tokens is None or runtime.allocator is None:
            return None
        return cls(
            model=model,
            allocator=runtime.allocator,
            budget_tokens=runtime.budget_tokens // runtime.places,
            tail_tokens=runtime.tail_tokens,
            page_size=runtime.page_size,
            sinks=runtime.token_selector.sinks,
        )

    def tokens(self, layer_id: int, needs: list[int]) -> Tensor:
        """The tokens that each row of a layer may keep: int64 [sequences, kv_heads].

        needs: of each sequence, the tokens that a row could take room for. What it leaves goes to the others, where the
        allocator says. Shared out anew only when a sequence has come to need another page, and never once none is
        short of what it could get.
        """
        in_tail = self.tail_tokens + (self.budget_tokens - self.tail_tokens) % self.page_size
        heads = [layer.kv_heads for layer in self.model.layers]
        total = (self.budget_tokens - in_tail) // self.page_size * sum(heads)
        needed = [min(total, -(-max(0, need - in_tail) // self.page_size)) for need in needs]
        if needed != self._shared_for:
            request = self._request(torch.tensor(needed), total, in_tail)
            pages = self.allocator.layers(request)
            split = [self.allocator.heads(request, layer, pages[:, layer], None) for layer in range(len(heads))]
            self._shares = [
                share[:, :count] * self.page_size + in_tail for share, count in zip(split, heads, strict=True)
            ]
            self._shared_for = needed
        return self._shares[layer_id]

    def _request(self, needed: Tensor, total: int, in_tail: int) -> AllocationRequest:
        """needed: int64 [sequences], the pages that a row without a window could fill."""
        heads = [layer.kv_heads for layer in self.model.layers]
        widest = max(heads)
        exists = torch.tensor([head < count for count in heads for head in range(widest)]).view(len(heads), widest)
        windows = [layer.window for layer in self.model.layers]
        # A window slides a page at a time, and its oldest page may be mostly behind it: two pages more than it shows.
        slack = 2 * self.page_size - in_tail
        within = [total if window is None else max(0, -(-(window + slack) // self.page_size)) for window in windows]
        ceiling = torch.minimum(needed[:, None], torch.tensor(within))[..., None] * exists
        return AllocationRequest(
            budget_pages=torch.full_like(needed, total),
            floor=ceiling.clamp(max=-(-self.sinks // self.page_size)),
            ceiling=ceiling,
            page_size=self.page_size,
        )
