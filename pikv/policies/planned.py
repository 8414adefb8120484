"""A plan: so many pages for each layer and head, and no more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import BoundedAllocator
from pikv.core.rounding import apportion
from pikv.core.views import AllocationRequest

_NEXT_TO_NOTHING = 1e-6  # the weight of a row that is planned no page: its sinks' pages are its floor


def _rows(planned: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(layer) for layer in planned)


@final
@attrs.frozen(kw_only=True)
class Planned(BoundedAllocator):
    """Give each row the pages that were planned for it, as `pikv.evaluation.solver` finds them by measured losses.

    most: pages beyond the exact tail, for each KV head of each layer. A text too short to fill a row's pages leaves
    them unused, so no row ever takes more bytes than planned. Under a budget below the plan, rows get less in
    proportion to it.
    """

    most: tuple[tuple[int, ...], ...] = attrs.field(default=(), converter=_rows)

    def __attrs_post_init__(self) -> None:
        if not all(isinstance(count, int) and count >= 0 for layer in self.most for count in layer):
            raise ConfigError(f"most must be whole numbers of pages from 0 on, got {self.most}")

    def layers(self, request: AllocationRequest) -> Tensor:
        """The sums of what all rows get."""
        floor, ceiling = request.floor.flatten(1), request.ceiling.flatten(1)
        weights = self._weights(request).flatten().expand_as(ceiling)
        return apportion(weights, request.budget_pages, floor, ceiling).view_as(request.ceiling).sum(-1)

    def heads(self, request: AllocationRequest, layer_id: int, pages: Tensor, scores: Tensor | None) -> Tensor:
        """In proportion to the plan."""
        floor, ceiling = request.floor[:, layer_id], request.ceiling[:, layer_id]
        return apportion(self._weights(request)[layer_id].expand_as(ceiling), pages, floor, ceiling)

    def _weights(self, request: AllocationRequest) -> Tensor:
        """[layers, kv_heads of the widest]; what the plan does not name has next to nothing."""
        weights = torch.full(request.ceiling.shape[1:], _NEXT_TO_NOTHING, dtype=torch.float64)
        for planned, row in zip(self.most, weights, strict=False):
            known = torch.tensor(planned[: len(row)], dtype=torch.float64)
            row[: len(known)] = known.clamp(min=_NEXT_TO_NOTHING)
        return weights
