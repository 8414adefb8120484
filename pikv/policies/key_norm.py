"""Short keys stay."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports import TokenSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class KeyNorm(TokenSelector):
    """Keep the tokens with the shortest keys: -|k_t|. Source: arXiv 2406.11430, section 4; kvpress's KnormPress.

    Short keys draw attention in many models, though nothing makes them: try before relying on it.
    """

    sinks: int = attrs.field(default=4, validator=at_least(0))
    recent: int = attrs.field(default=32, validator=at_least(0))

    def score(self, view: TokenView) -> Tensor:
        """-|k_t|: [sequences, kv_heads, tokens]."""
        return view.keys.float().square().sum(-1).sqrt().neg()
