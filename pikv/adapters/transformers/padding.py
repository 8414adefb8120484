"""What a cache has seen: how many tokens, which of them were padding, and what they were."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from pikv.adapters.transformers.text import Text
from pikv.core.errors import InputError, VersionError


@attrs.frozen
class Seen:
    """The tokens so far. mask: bool [batch, length], False where there was padding; None if there is none.

    text: what they were; None where some came as embeddings, and before the first.
    """

    length: int
    mask: Tensor | None
    text: Text | None = None

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

    def followed_by(self, positions: Tensor, mask: Tensor | None, text: Text | None) -> Seen:
        """With new tokens at positions [batch, tokens]."""
        length = self.length + positions.shape[1]
        padded = self.mask is not None or bool((positions < 0).any())
        whole = text if not self.length or text is None else self.text and self.text.followed_by(text)
        return Seen._of(length, mask[:, :length] != 0 if mask is not None and padded else None, whole)

    def cropped(self, length: int) -> Seen:
        """The first tokens alone."""
        mask = None if self.mask is None else self.mask[:, :length]
        return Seen._of(length, mask, self.text and self.text.part(0, length))

    def select(self, index: Tensor) -> Seen:
        """The sequences at index int64 [n]."""
        mask = None if self.mask is None else self.mask[index.to(self.mask.device)]
        return Seen._of(self.length, mask, self.text and self.text.select(index))

    @classmethod
    def _of(cls, length: int, mask: Tensor | None, text: Text | None) -> Seen:
        return cls(length, None if mask is None or bool(mask.all()) else mask, text)

    # --- in a commit

    def states(self) -> dict[str, Tensor]:
        """All of it as tensors under names."""
        states = {"length": torch.tensor(self.length)}
        if self.mask is not None:
            states["mask"] = self.mask.cpu()
        if self.text is not None:
            states |= {"ids": self.text.ids, "places": self.text.places}
        return states

    @classmethod
    def of(cls, states: Mapping[str, Tensor]) -> Seen:
        """What `states` has made tensors of. Raises VersionError where it has not."""
        if "length" not in states:
            raise VersionError(
                "this version was committed by PiKVCache.commit, which knows no padding; restore it by "
                "PiKVCache.restore, and commit a host's caches by their own commit()"
            )
        text = Text(states["ids"], states["places"]) if "ids" in states else None
        return cls(int(states["length"]), states.get("mask"), text)

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
