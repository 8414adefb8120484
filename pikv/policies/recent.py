"""Sinks and a recent window."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import TokenSelector
from pikv.core.views import TokenView


@final
@attrs.frozen(kw_only=True)
class Recent(TokenSelector):
    """Keep the first tokens and the newest ones. Source: StreamingLLM, arXiv 2309.17453, section 3.2.

    The page that holds the sinks stays whole, so the tokens next to them stay too.
    """

    sinks: int = 4
    recent: int = 0

    def __attrs_post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise ConfigError(f"sinks and recent must not be negative, got {self.sinks} and {self.recent}")

    def score(self, view: TokenView) -> Tensor:
        """The newer, the higher: the positions [sequences, kv_heads, tokens]."""
        return view.positions
