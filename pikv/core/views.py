"""What policies are shown of a cache. Nothing here can be changed through a view."""

from __future__ import annotations

from collections.abc import Callable

import attrs
from torch import Tensor


@attrs.frozen(kw_only=True)
class TokenView:
    """The stored tokens of one layer, oldest first.

    positions: int32 [sequences, kv_heads, tokens]; -1 where a row has fewer tokens than the longest.
    """

    layer_id: int
    positions: Tensor
    _decode: Callable[[], tuple[Tensor, Tensor]]

    @property
    def keys(self) -> Tensor:
        """[sequences, kv_heads, tokens, key_dim] as they are read back; decoded on request."""
        return self._decode()[0]

    @property
    def values(self) -> Tensor:
        """[sequences, kv_heads, tokens, value_dim] as they are read back; decoded on request."""
        return self._decode()[1]


@attrs.frozen(kw_only=True)
class ContextKV:
    """The stored tokens of one layer, decoded, oldest first; for anybody's attention.

    keys [sequences, kv_heads, tokens, key_dim], values [..., value_dim], positions int32 [sequences, kv_heads,
    tokens] and mask bool of the same shape: False where a row has fewer tokens than the longest.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    mask: Tensor


@attrs.frozen(kw_only=True)
class AllocationRequest:
    """How many pages there are to give out, and within which limits.

    budget_pages: int64 [sequences], for all layers and heads together.
    floor, ceiling: int64 [sequences, layers, kv_heads], what a row must and can get; the ceiling is what exists.
    """

    budget_pages: Tensor
    floor: Tensor
    ceiling: Tensor
    page_size: int
