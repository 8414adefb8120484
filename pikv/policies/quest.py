"""Quest: read the pages whose keys could answer the query best."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import torch
from torch import Tensor

from pikv.core.ports import IndexForm, IndexMeaning, PageIndex, PageSelector
from pikv.policies.settings import at_least

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig


@final
@attrs.frozen(kw_only=True)
class Quest(PageSelector):
    """Score a page by an upper bound on every q.k in it. Source: Quest, arXiv 2406.10774, section 3.2.

    Of each page and channel, the least and the greatest key m and M are kept (float16, rounded outwards); the score
    is sum_d max(q_d m_d, q_d M_d) = relu(q) . M - relu(-q) . m, the greatest over the group's query heads.
    """

    pages: int = attrs.field(default=32, validator=at_least(1))
    dense_layers: int = attrs.field(default=2, validator=at_least(0))

    def index_form(self, layer: LayerConfig, page_size: int) -> IndexForm:
        """Least and greatest key of each channel: float16 [2, key_dim]."""
        return IndexForm(torch.float16, (2, layer.key_dim), IndexMeaning.BOUNDS)

    def index(self, keys: Tensor, out: Tensor) -> None:
        """See PageSelector.index."""
        out[:, 0] = -_rounded_up(-keys.amin(1).float())
        out[:, 1] = _rounded_up(keys.amax(1).float())

    def score(self, index: PageIndex, query: Tensor) -> Tensor:
        """See PageSelector.score."""
        least, greatest = index.arrays.float().unbind(-2)
        query = query.float()
        bound = query.clamp(min=0) @ greatest.mT - (-query).clamp(min=0) @ least.mT  # [.., group, pages]
        return bound.nan_to_num(nan=torch.inf).amax(2)  # NaN is 0 * inf: a key beyond float16, so read the page


def _rounded_up(numbers: Tensor) -> Tensor:
    """The least float16 that is not below each float32 number."""
    near = numbers.to(torch.float16) + 0.0  # + 0.0 turns -0 into 0, whose bits count up
    bits = near.view(torch.int16)
    above = torch.where(near < 0, bits - 1, bits + 1).view(torch.float16)
    return torch.where(near.float() < numbers, above, near)
