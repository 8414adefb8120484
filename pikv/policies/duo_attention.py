"""A few heads look far back and keep nearly everything; the others keep sinks and what is recent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self, final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import Allocator
from pikv.core.rounding import apportion
from pikv.core.views import AllocationRequest, TokenView

_NEXT_TO_NOTHING = 1e-6  # the weight of a streaming head: what retrieval heads cannot fill goes to it


def reach(view: TokenView, *, sinks: int, recent: int) -> Tensor:
    """How much each KV head attends beyond sinks and recent tokens: float32 [kv_heads], from 0 to 1.

    The mean, over sequences and the view's queries, of the attention to tokens that are neither among the first
    `sinks` nor fewer than `recent` before the query; of the group's heads, that which reaches farthest.
    """
    attention = view.attention()  # [sequences, kv_heads, group, window, tokens]
    assert view.asked is not None  # or there was no attention
    held, asked = view.positions[:, :, None, :], view.asked.to(view.positions.device)[:, None, :, None]
    far = (held >= sinks) & (held <= asked - recent)
    queries = (view.asked >= 0).sum().clamp(min=1)
    reached = (attention * far[:, :, None]).sum((0, 3, 4)) / queries.to(attention.device)
    return reached.amax(-1).float().cpu()


def _heads(named: Iterable[Iterable[int]]) -> frozenset[tuple[int, int]]:
    return frozenset((layer, head) for layer, head in named)


@final
@attrs.frozen(kw_only=True)
class DuoAttention(Allocator):
    """Give the pages to retrieval heads; streaming heads keep the exact tail. Source: arXiv 2410.10819, section 3.

    retrieval: the heads that retrieve, as (layer, KV head) from 0 on. They share the pages evenly; what they cannot
    fill goes to the others, and which tokens a row keeps is the token selector's word, so under a tight budget a
    retrieval head keeps its best tokens where the paper's keeps all. The paper learns which heads retrieve by
    optimizing gates on passkey texts; `calibrated` ranks heads by how far they attend: one pass and no training.
    """

    retrieval: frozenset[tuple[int, int]] = attrs.field(default=frozenset(), converter=_heads)

    @classmethod
    def calibrated(cls, views: Sequence[TokenView], *, heads: int, sinks: int = 4, recent: int = 64) -> Self:
        """The `heads` KV heads of a model that reach farthest in what the views hold.

        views: `cache.view(layer_id)` of each layer, of a cache that holds a text such as the model will meet and looks
        at its newest queries, as with Importance(window=256) and a budget that evicts nothing.
        """
        reached = {
            (layer_id, head): float(far)
            for layer_id, view in enumerate(views)
            for head, far in enumerate(reach(view, sinks=sinks, recent=recent))
        }
        if not 1 <= heads <= len(reached):
            raise ConfigError(f"heads must be between 1 and the model's {len(reached)} KV heads, got {heads}")
        return cls(retrieval=sorted(reached, key=lambda head: -reached[head])[:heads])

    def layers(self, request: AllocationRequest) -> Tensor:
        """The sums of what all rows get."""
        floor, ceiling = request.floor.flatten(1), request.ceiling.flatten(1)
        weights = self._weights(request).flatten().expand_as(ceiling)
        shares = apportion(weights, request.budget_pages, floor, ceiling)
        return shares.view_as(request.ceiling).sum(-1)

    def heads(self, request: AllocationRequest, layer_id: int, pages: Tensor, scores: Tensor | None) -> Tensor:
        """Retrieval heads first, evenly; then the others."""
        floor, ceiling = request.floor[:, layer_id], request.ceiling[:, layer_id]
        return apportion(self._weights(request)[layer_id].expand_as(ceiling), pages, floor, ceiling)

    def _weights(self, request: AllocationRequest) -> Tensor:
        """[layers, kv_heads of the widest]; a row past a layer's own heads has a ceiling of 0."""
        layers, widest = request.ceiling.shape[1:]
        weights = torch.full((layers, widest), _NEXT_TO_NOTHING, dtype=torch.float64)
        for layer_id, head in self.retrieval:
            if not (0 <= layer_id < layers and 0 <= head < widest):
                raise ConfigError(
                    f"retrieval names head {head} of layer {layer_id}, the model has {layers} layers of up to {widest} "
                    "KV heads; calibrate for this model"
                )
            weights[layer_id, head] = 1.0
        return weights
