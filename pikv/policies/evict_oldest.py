"""A full pool: the layer's oldest pages leave."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import FullPool


@final
@attrs.frozen(kw_only=True)
class EvictOldest(FullPool):
    """Let the oldest pages of the layer that needs room leave, all heads in step.

    first_pages: the first pages of each row, which hold the attention sinks, stay.
    """

    first_pages: int = 1

    def __attrs_post_init__(self) -> None:
        if self.first_pages < 0:
            raise ConfigError(f"first_pages must not be negative, got {self.first_pages!r}")

    def leaving(self, newest: Tensor, pages_needed: int) -> Tensor | None:
        """The pages with the oldest tokens; None if there are too few."""
        held = newest >= 0
        held[..., : self.first_pages] = False
        age = newest.masked_fill(~held, torch.iinfo(torch.int64).max).flatten()
        if int(held.sum()) < pages_needed:
            return None
        last = age.sort().values[pages_needed - 1]
        return (newest <= last) & held
