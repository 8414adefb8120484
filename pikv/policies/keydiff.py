"""Unusual keys stay."""

from __future__ import annotations

from typing import final

import attrs
import torch.nn.functional as F
from torch import Tensor

from pikv.core.ports import TokenSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class KeyDiff(TokenSelector):
    """Keep the tokens whose keys are least like the others: -cos(k_t, mean_j k_j / |k_j|). Source: arXiv 2504.15364.

    Needs no queries, so it holds up where the question is not known yet (section 3.2). The mean is over what is stored
    of the row, newest chunk included, as in the paper's block-wise eviction. Keys are as attention has them, rotated.
    """

    sinks: int = attrs.field(default=4, validator=at_least(0))
    recent: int = attrs.field(default=32, validator=at_least(0))

    def score(self, view: TokenView) -> Tensor:
        """-cos(k_t, mean direction): [sequences, kv_heads, tokens]."""
        directions = F.normalize(view.keys.float(), dim=-1)
        usual = directions.masked_fill(view.positions[..., None] < 0, 0.0).sum(2, keepdim=True)
        return -F.cosine_similarity(directions, usual, dim=-1)
