"""Sinks and a recent window."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports import TokenSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class Recent(TokenSelector):
    """Keep the first tokens and the newest ones. Source: StreamingLLM, arXiv 2309.17453, section 3.2.

    The page that holds the sinks stays whole, so the tokens next to them stay too.
    """

    sinks: int = attrs.field(default=4, validator=at_least(0))
    recent: int = attrs.field(default=0, validator=at_least(0))

    def score(self, view: TokenView) -> Tensor:
        """The newer, the higher: the positions [sequences, kv_heads, tokens]."""
        return view.positions
