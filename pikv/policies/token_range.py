"""Token ranges in turn: the first to place 0, the next to place 1, and so on around."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports import Sharding
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class TokenRange(Sharding):
    """Ranges of `tokens` positions go around the places, so that all fill at the same rate."""

    tokens: int = attrs.field(default=64, validator=at_least(1))

    def owner(self, positions: Tensor, places: int) -> Tensor:
        """(position // tokens) mod places; a padded token (-1) belongs to the last place, which does not store it."""
        return (positions // self.tokens) % places
