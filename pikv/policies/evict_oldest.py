"""A full pool: the layer's oldest pages leave."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.ports import FullPool
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class EvictOldest(FullPool):
    """Let the oldest pages of the layer that needs room leave, all heads in step.

    first_pages: the first pages of each row, which hold the attention sinks, stay.
    """

    first_pages: int = attrs.field(default=1, validator=at_least(0))

    def leaving(self, newest: Tensor, pages_needed: int) -> Tensor | None:
        """The pages with the oldest tokens; None if there are too few."""
        held = newest >= 0
        held[..., : self.first_pages] = False
        age = newest.masked_fill(~held, torch.iinfo(torch.int64).max).flatten()
        if int(held.sum()) < pages_needed:
            return None
        last = age.sort().values[pages_needed - 1]
        return (newest <= last) & held
