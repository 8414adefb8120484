"""What policies are shown of a cache. They share memory with the cache: read them, and do not write to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core import attention
from pikv.core.errors import StateError

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig


@attrs.frozen(kw_only=True)
class TokenView:
    """The stored tokens of one layer, oldest first.

    positions: int32 [sequences, kv_heads, tokens]; each row's tokens stand from index 0 on, and past its last one there
    is -1. There may be no tokens at all.
    queries: [sequences, query_heads, window, key_dim], the newest queries, and asked: int64 [sequences, window], their
    positions, -1 where a sequence has had fewer; None unless the selector asks for a window of queries.
    """

    layer_id: int
    layer: LayerConfig
    positions: Tensor
    queries: Tensor | None = None
    asked: Tensor | None = None
    _decode: Callable[[], tuple[Tensor, Tensor]]

    @property
    def keys(self) -> Tensor:
        """[sequences, kv_heads, tokens, key_dim] as they are read back; decoded on request."""
        return self._decode()[0]

    @property
    def unrotated_keys(self) -> Tensor:
        """The keys before rotary embedding, [sequences, kv_heads, tokens, key_dim]; decoded on request.

        A row whose positions are places in a padded sequence keeps the rotation by its padding, the same for all its
        keys. Raises StateError where it is not known how the layer rotates.
        """
        if self.layer.rotary is None:
            raise StateError(
                f"layer {self.layer_id} has no rotary, so its keys cannot be un-rotated; derive from NeedsRotary too, "
                "so that this is refused when composed"
            )
        return self.layer.rotary.remove(self.keys, self.positions)

    @property
    def values(self) -> Tensor:
        """[sequences, kv_heads, tokens, value_dim] as they are read back; decoded on request."""
        return self._decode()[1]

    def attention(self) -> Tensor:
        """How much each of the newest queries attends to each stored token, causal: the softmax over what is stored.

        [sequences, kv_heads, group, window, tokens]; 0 for a query that has not been asked, a token that is newer
        than the query, and where there is no token.
        """
        if self.queries is None or self.asked is None:
            raise StateError(
                "this view has no queries: only a QueryTokenSelector is shown the newest ones; derive from it and give "
                "it a window"
            )
        grouped = self.queries.unflatten(1, (-1, self.layer.group))  # [sequences, kv_heads, group, window, key_dim]
        folded = attention.score(grouped.flatten(2, 3), self.keys, scale=self.layer.scale, softcap=self.layer.softcap)
        scores = folded.unflatten(2, grouped.shape[2:4])
        held, asked = self.positions[:, :, None, None, :], self.asked[:, None, None, :, None].to(self.positions.device)
        seen = (held >= 0) & (held <= asked)
        if self.layer.window is not None:
            seen &= held > asked - self.layer.window
        scores = scores.masked_fill(~seen, -torch.inf)
        return torch.exp(scores - attention.finite(scores.logsumexp(-1, keepdim=True)))


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
