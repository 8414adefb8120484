"""The allocator port: how many pages each layer and head may keep."""

from __future__ import annotations

import abc

from torch import Tensor

from pikv.core.ports.selector import TokenSelector
from pikv.core.views import AllocationRequest


class Allocator(abc.ABC):
    """Share a budget out. Settings only.

    The sum over layers is `clamp(budget, sum of floors, sum of ceilings)`, exactly; `pikv.core.rounding` does the
    arithmetic, so that an author writes only the wanted proportions.
    """

    @abc.abstractmethod
    def layers(self, request: AllocationRequest) -> Tensor:
        """Return the pages of each layer, all heads together: int64 [sequences, layers]."""

    @abc.abstractmethod
    def heads(self, request: AllocationRequest, layer_id: int, pages: Tensor, scores: Tensor | None) -> Tensor:
        """Split the pages [sequences] of one layer among its heads: int64 [sequences, kv_heads].

        The request's kv_heads are those of the widest layer; a layer with fewer heads has a ceiling of 0 for the rest.
        scores: [sequences, kv_heads, tokens] where the allocator asks for them, else None; see ScoreAllocator.
        """


class BoundedAllocator(Allocator):
    """An allocator that gives no row more than a bound, whatever the budget leaves; the rest of it is not given out.

    The bounds are part of a request's ceilings, so an author shares out as any other allocator does.
    """

    most: tuple[tuple[int, ...], ...]
    """The pages that each KV head of each layer may have at one place, its sinks included."""


class ScoreAllocator(Allocator):
    """An allocator whose split among the heads of a layer follows scores of their tokens.

    It is asked without scores for what the layer has in all, and with them whenever a prompt is evicted from. While
    decoding the split stays as the prompt left it, since pages that a head gives up do not come back, and is made anew
    only when the layer has come to have another number of pages. Scores are -inf where a row has no token, and for the
    sinks and recent tokens, which stay in every head.
    """

    scored_by: TokenSelector | None
    """Whose scores the split follows; None for those of the cache's own token selector."""
