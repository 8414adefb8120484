"""PiKV's importance: the attention that a token gets."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports import QueryTokenSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class Importance(QueryTokenSelector):
    """Keep the tokens that get the most attention: I_t = sum_h softmax(Q_h K_t / sqrt(d)). Source: arXiv 2508.06526.

    The sum runs over the query heads h of the token's KV head and over the newest `window` queries. Causal: a token
    gains nothing from a query before it. The softmax is over what is stored, so scores follow what was evicted.
    """

    window: int = attrs.field(default=32, validator=at_least(1))
    sinks: int = attrs.field(default=4, validator=at_least(0))
    recent: int = attrs.field(default=32, validator=at_least(0))

    def score(self, view: TokenView) -> Tensor:
        """I_t: [sequences, kv_heads, tokens]."""
        return view.mass()
