"""Which of the tokens that a cache has seen were padding."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from pikv.core.errors import InputError


@attrs.frozen
class Seen:
    """The tokens so far. mask: bool [batch, length], False where there was padding; None if there is none."""

    length: int
    mask: Tensor | None

    @classmethod
    def nothing(cls) -> Seen:
        """Before the first token."""
        return cls(0, None)

    def positions(self, batch: int, tokens: int, mask: Tensor | None) -> Tensor:
        """Positions of new tokens, int64 [batch, tokens] on the CPU: p in the padded sequence, -2 - p for padding.

        mask: [batch, length + tokens or more], or None if no token is padding. Raises InputError for a mask that does
        not cover all tokens, or that says otherwise of an older token than the masks before.
        """
        self._check(batch, tokens, mask)
        places = torch.arange(self.length, self.length + tokens).expand(batch, tokens)
        if mask is None:
            return places
        stored = mask[:, self.length : self.length + tokens].cpu() != 0
        return torch.where(stored, places, -2 - places)  # transformers answers padding too, from what is before it

    def followed_by(self, positions: Tensor, mask: Tensor | None) -> Seen:
        """With new tokens at positions [batch, tokens]."""
        length = self.length + positions.shape[1]
        padded = self.mask is not None or bool((positions < 0).any())
        return Seen._of(length, mask[:, :length] != 0 if mask is not None and padded else None)

    def cropped(self, length: int) -> Seen:
        """The first tokens alone."""
        return Seen._of(length, None if self.mask is None else self.mask[:, :length])

    def select(self, index: Tensor) -> Seen:
        """The sequences at index int64 [n]."""
        return Seen._of(self.length, None if self.mask is None else self.mask[index.to(self.mask.device)])

    @classmethod
    def _of(cls, length: int, mask: Tensor | None) -> Seen:
        return cls(length, None if mask is None or bool(mask.all()) else mask)

    def _check(self, batch: int, tokens: int, mask: Tensor | None) -> None:
        if mask is None:
            if self.mask is not None:
                raise InputError("attention_mask must be given again: this cache's batch has padding")
            return
        if not isinstance(mask, Tensor):
            raise InputError(f"attention_mask must be a tensor [batch, tokens], got a {type(mask).__name__}")
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < self.length + tokens:
            raise InputError(
                f"attention_mask must be [batch, tokens seen and new] = [{batch}, {self.length + tokens}], got "
                f"{list(mask.shape)}; masks of more dimensions (token trees, packed sequences) are not supported"
            )
        older = mask[:, : self.length] != 0
        same = bool(older.all()) if self.mask is None else torch.equal(older, self.mask)
        if not same:
            raise InputError(
                "attention_mask must go on saying of older tokens what it said when they came: what was padding is "
                "not stored, and what is stored stays; use a new cache for another mask"
            )
