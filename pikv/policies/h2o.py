"""Tokens that have got the most attention."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports import AttendedTokenSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class HeavyHitters(AttendedTokenSelector):
    """Keep the heavy hitters: the sums of attention since each token came. Source: H2O, arXiv 2306.14048, algorithm 1.

    sum_i a_ij over all queries i since token j was stored, those of the prompt included, over the heads of its KV head.
    The paper gives half of the budget to `recent` tokens. Sealed pages leave whole, by the mean of their tokens' sums,
    where the paper lets tokens leave one by one. Attention is computed a second time to be summed, which doubles what a
    step reads.
    """

    sinks: int = attrs.field(default=0, validator=at_least(0))
    recent: int = attrs.field(default=64, validator=at_least(0))

    def fold(self, view: TokenView) -> Tensor:
        """What was remembered, and what the view's queries add."""
        assert view.attended is not None  # core shows it
        return view.attended + view.mass()

    def score(self, view: TokenView) -> Tensor:
        """The sums: [sequences, kv_heads, tokens]."""
        assert view.attended is not None  # core shows it
        return view.attended
