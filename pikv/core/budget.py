"""How many tokens each layer and head may keep right now, from the budget, the allocator and what exists."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from pikv.core.ports.allocator import BoundedAllocator, ScoreAllocator
from pikv.core.views import AllocationRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from pikv.core.config import ModelConfig
    from pikv.core.places import Places
    from pikv.core.ports import Allocator
    from pikv.core.runtime import RuntimeConfig


@attrs.frozen(kw_only=True)
class Share:
    """What one layer may keep now, in tokens: int64 [sequences, kv_heads].

    even: as the allocator splits it without scores. by_scores: how it splits it by scores [sequences, kv_heads,
    tokens]; None if scores do not matter to it. anew: whether an earlier split by scores is to be forgotten.
    """

    even: Tensor
    by_scores: Callable[[Tensor], Tensor] | None = None
    anew: bool = True

    def exceeded(self, occupied: Tensor, split: Tensor) -> bool:
        """Whether rows take room for more, int64 [sequences, kv_heads]; split: the last one by scores, or below 0."""
        if self.by_scores is None:
            return bool((occupied > self.even).any())
        holds = self._holds(split)
        over = torch.where(holds, occupied > split, occupied.sum(-1, keepdim=True) > self.even.sum(-1, keepdim=True))
        return bool(over.any())

    def split(self, scores: Tensor, last: Tensor) -> Tensor:
        """What each row may keep, given the scores; last: the last split by scores, which holds while decoding."""
        assert self.by_scores is not None
        return torch.where(self._holds(last), last, self.by_scores(scores))

    def _holds(self, split: Tensor) -> Tensor:
        """Whether a sequence's last split is still one of what the layer has: bool [sequences, 1]."""
        return (split.sum(-1, keepdim=True) == self.even.sum(-1, keepdim=True)) & (not self.anew)


@attrs.define(kw_only=True)
class Budget:
    """A mean of budget_tokens for each layer and KV head, shared out in whole pages by the allocator.

    What exceeds whole pages beyond tail_tokens stays in the tail. places: who divides it. All heads are allocated for,
    wherever they are stored, so that each gets what it would get on one place.
    """

    model: ModelConfig
    places: Places
    allocator: Allocator
    budget_tokens: int
    tail_tokens: int
    page_size: int
    sinks: int
    _shared_for: list[int] | None = attrs.field(default=None, init=False)
    _request: AllocationRequest | None = attrs.field(default=None, init=False)
    _pages: Tensor | None = attrs.field(default=None, init=False)
    _shares: list[Tensor] = attrs.field(factory=list, init=False)

    @classmethod
    def of(cls, places: Places, runtime: RuntimeConfig) -> Budget | None:
        """This place's share of the runtime's budget; None if it has none. ConfigError if that is too little."""
        if runtime.budget_tokens is None or runtime.allocator is None:
            return None
        runtime.check_budget(places.sharing)
        return cls(
            model=places.model,
            places=places,
            allocator=runtime.allocator,
            budget_tokens=runtime.budget_tokens // places.sharing,
            tail_tokens=runtime.tail_tokens,
            page_size=runtime.page_size,
            sinks=runtime.token_selector.sinks,
        )

    def share(self, layer_id: int, needs: list[int], *, anew: bool) -> Share:
        """What the rows of a layer may keep.

        needs: of each sequence, the tokens that a row could take room for. What it leaves goes to the others, where the
        allocator says. Shared out anew only when a sequence has come to need another page, and never once none is
        short of what it could get. anew: whether a prompt is being read, so that splits by scores follow it.
        """
        needed = [min(self._total, -(-max(0, need - self._in_tail) // self.page_size)) for need in needs]
        if needed != self._shared_for:
            request = self._requested(torch.tensor(needed))
            pages = self.allocator.layers(request)
            self._shares = [self._split(request, pages, layer, None) for layer in range(len(self.model.layers))]
            self._request, self._pages, self._shared_for = request, pages, needed
        assert self._request is not None
        assert self._pages is not None
        if not isinstance(self.allocator, ScoreAllocator):
            return Share(even=self._shares[layer_id])
        by_scores = functools.partial(self._split, self._request, self._pages, layer_id)
        return Share(even=self._shares[layer_id], by_scores=by_scores, anew=anew)

    @property
    def _in_tail(self) -> int:
        """The tokens of a row that are not given out in pages."""
        return self.tail_tokens + (self.budget_tokens - self.tail_tokens) % self.page_size

    @property
    def _total(self) -> int:
        """The pages of all rows of a sequence."""
        rows = sum(layer.kv_heads for layer in self.model.layers)
        return (self.budget_tokens - self._in_tail) // self.page_size * rows

    def _split(self, request: AllocationRequest, pages: Tensor, layer_id: int, scores: Tensor | None) -> Tensor:
        """The tokens of a layer's rows, of the heads stored here."""
        shares = self.allocator.heads(request, layer_id, pages[:, layer_id], scores)
        own = self.places.own_heads(self.model.layers[layer_id].kv_heads)
        return shares[:, own] * self.page_size + self._in_tail

    def _requested(self, needed: Tensor) -> AllocationRequest:
        """needed: int64 [sequences], the pages that a row without a window could fill."""
        heads = [layer.kv_heads for layer in self.model.layers]
        widest = max(heads)
        exists = torch.tensor([head < count for count in heads for head in range(widest)]).view(len(heads), widest)
        windows = [layer.window for layer in self.model.layers]
        # A window slides a page at a time, and its oldest page may be mostly behind it: two pages more than it shows.
        slack = 2 * self.page_size - self._in_tail
        total = self._total
        within = [total if window is None else max(0, -(-(window + slack) // self.page_size)) for window in windows]
        ceiling = torch.minimum(needed[:, None], torch.tensor(within))[..., None] * exists
        if isinstance(self.allocator, BoundedAllocator):
            most = [F.pad(torch.tensor(rows), (0, widest - len(rows))) for rows in self.allocator.most]
            ceiling = torch.minimum(ceiling, torch.stack(most))
        return AllocationRequest(
            budget_pages=torch.full_like(needed, total),
            floor=ceiling.clamp(max=-(-self.sinks // self.page_size)),
            ceiling=ceiling,
            page_size=self.page_size,
        )
