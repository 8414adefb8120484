"""What the last query attends to."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports import QueryTokenSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class Tova(QueryTokenSelector):
    """Keep what the newest query attends to, averaged over all heads. Source: TOVA, arXiv 2401.06104, section 4.

    All KV heads of a layer keep the same tokens as long as they have the same budget: a token's score is the mean over
    the layer's query heads, wherever it stands in each row. A head that has let it go counts as 0.
    """

    sinks: int = attrs.field(default=0, validator=at_least(0))
    recent: int = attrs.field(default=1, validator=at_least(0))
    window: int = attrs.field(default=1, init=False)

    def score(self, view: TokenView) -> Tensor:
        """The attention of the newest query, a mean over the layer's heads: [sequences, kv_heads, tokens]."""
        mass = view.mass()
        if not mass.shape[-1]:
            return mass
        place = view.positions.long() + 1  # 0 collects what lies in empty slots: nothing
        by_position = mass.new_zeros(len(mass), int(place.max()) + 1)
        by_position.scatter_add_(1, place.flatten(1), mass.flatten(1))
        return by_position.gather(1, place.flatten(1)).view_as(mass) / view.layer.query_heads
