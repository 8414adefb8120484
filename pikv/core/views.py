"""What policies are shown of a cache. They share memory with the cache: read them, and do not write to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core import attention
from pikv.core.errors import StateError

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig

SCORES_AT_ONCE = 1 << 20  # entries of the attention matrix that a sum over it holds at a time


@attrs.frozen(kw_only=True)
class TokenView:
    """The stored tokens of one layer, oldest first.

    positions: int32 [sequences, kv_heads, tokens]; each row's tokens stand from index 0 on, and past its last one there
    is -1. There may be no tokens at all.
    queries: [sequences, query_heads, window, key_dim], the newest queries, and asked: int64 [sequences, window], their
    positions, -1 where a sequence has had fewer; None unless the selector asks for a window of queries.
    attended: float32 [sequences, kv_heads, tokens], what an AttendedTokenSelector remembers of each token; else None.
    """

    layer_id: int
    layer: LayerConfig
    positions: Tensor
    queries: Tensor | None = None
    asked: Tensor | None = None
    attended: Tensor | None = None
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

    def with_newest(self, window: int) -> TokenView:
        """The same tokens with no more than the newest `window` of the queries."""
        if self.queries is None or self.asked is None or self.asked.shape[1] <= window:
            return self
        return attrs.evolve(self, queries=self.queries[:, :, -window:], asked=self.asked[:, -window:])

    def mass(self) -> Tensor:
        """How much attention each stored token gets from the newest queries of its KV head: `attention()`, summed up.

        [sequences, kv_heads, tokens]. The matrix is not held, but a block of it at a time.
        """
        return self._folded(lambda block: block.sum((2, 3)))

    def peak(self) -> Tensor:
        """The most that any of the newest queries of its KV head attends to each stored token; otherwise as `mass`."""
        return self._folded(lambda block: block.amax((2, 3)))

    def _folded(self, fold: Callable[[Tensor], Tensor]) -> Tensor:
        """Blocks of the matrix [sequences, kv_heads, group, window, tokens] folded over their queries."""
        queries, asked = self._asked()
        keys, positions = self.keys, self.positions

        def scores(block: slice) -> Tensor:
            return self._scores(queries, asked, keys[:, :, block], positions[..., block])

        tokens = max(1, SCORES_AT_ONCE // max(1, math.prod(queries.shape[:4])))
        blocks = [slice(start, start + tokens) for start in range(0, positions.shape[-1], tokens)]
        total = queries.new_full(queries.shape[:4], -torch.inf, dtype=attention.accumulator(queries.dtype))
        for block in blocks:
            total = total.logaddexp(scores(block).logsumexp(-1))
        total = attention.finite(total)[..., None]
        folded = [fold(torch.exp(scores(block) - total)) for block in blocks]
        return torch.cat(folded, dim=-1) if folded else total.new_zeros(positions.shape)

    def attention(self) -> Tensor:
        """How much each of the newest queries attends to each stored token, causal: the softmax over what is stored.

        [sequences, kv_heads, group, window, tokens]; 0 for a query that has not been asked, a token that is newer
        than the query, and where there is no token.
        """
        scores = self._scores(*self._asked(), self.keys, self.positions)
        return torch.exp(scores - attention.finite(scores.logsumexp(-1, keepdim=True)))

    def _asked(self) -> tuple[Tensor, Tensor]:
        """The newest queries [sequences, kv_heads, group, window, key_dim], and their positions on the same device."""
        if self.queries is None or self.asked is None:
            raise StateError(
                "this view has no queries: only a QueryTokenSelector is shown the newest ones; derive from it and give "
                "it a window"
            )
        return self.queries.unflatten(1, (-1, self.layer.group)), self.asked.to(self.positions.device)

    def _scores(self, queries: Tensor, asked: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """Scores of some of the tokens, [sequences, kv_heads, group, window, tokens]; -inf where one is not seen."""
        folded = attention.score(queries.flatten(2, 3), keys, scale=self.layer.scale, softcap=self.layer.softcap)
        held, asked = positions[:, :, None, None, :], asked[:, None, None, :, None]
        seen = (held >= 0) & (held <= asked)
        if self.layer.window is not None:
            seen &= held > asked - self.layer.window
        scores: Tensor = folded.unflatten(2, queries.shape[2:4])
        return scores.masked_fill(~seen, -torch.inf)


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

    @classmethod
    def of(cls, view: TokenView) -> ContextKV:
        """What a view shows, with zeros where there is no token."""
        mask = view.positions >= 0
        keys, values = (states.masked_fill(~mask[..., None], 0) for states in (view.keys, view.values))
        return cls(keys=keys, values=values, positions=view.positions, mask=mask)


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
