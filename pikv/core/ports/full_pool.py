"""What happens when the pool has no room: an inner port of two implementations."""

from __future__ import annotations

import abc

from torch import Tensor


class FullPool(abc.ABC):
    """Choose the pages that leave when a layer must seal and the pool is full. Settings only."""

    @abc.abstractmethod
    def leaving(self, newest: Tensor, pages_needed: int) -> Tensor | None:
        """Choose at least `pages_needed` pages of the layer, which is positive, or None to refuse.

        newest: int64 [sequences, kv_heads, pages], the newest position in each sealed page, -1 where there is no
        page. Returns bool of the same shape.
        """
