"""The selector port: which tokens stay."""

from __future__ import annotations

import abc

from torch import Tensor

from pikv.core.views import TokenView


class TokenSelector(abc.ABC):
    """Say how much each token matters. Settings only.

    Authors write `score`. Top-k, ties, rounding and the two protected sets are written once, in core.
    """

    sinks: int
    """The first tokens of a sequence, kept whatever their score."""
    recent: int
    """The newest tokens of a sequence, kept whatever their score."""

    @abc.abstractmethod
    def score(self, view: TokenView) -> Tensor:
        """Return [sequences, kv_heads, tokens]; the lowest leave first. Changes nothing."""
