"""The tokens that a cache has read, kept so that they can be read again."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen
class Text:
    """Token ids and the position ids that came with them: int32 [batch, length] on the CPU.

    Position ids are what rotary embeddings turn by: `generate` counts them without padding, a plain call with it.
    """

    ids: Tensor
    places: Tensor

    @classmethod
    def of(cls, given: dict[str, Any], start: int) -> Text | None:
        """The tokens that a model's call brings, the first at `start`; None where they come as embeddings."""
        ids, places = given.get("input_ids"), given.get("position_ids")
        if ids is None:
            return None
        if places is None:
            places = torch.arange(start, start + ids.shape[1])
        places = places.expand(ids.shape)  # one row for all, or one each
        return cls(ids.to("cpu", torch.int32, copy=True), places.to("cpu", torch.int32, copy=True))

    def followed_by(self, other: Text) -> Text:
        """Both, one after another."""
        return Text(torch.cat([self.ids, other.ids], dim=1), torch.cat([self.places, other.places], dim=1))

    def part(self, start: int, stop: int) -> Text:
        """The tokens from start up to stop."""
        return Text(self.ids[:, start:stop], self.places[:, start:stop])

    def select(self, index: Tensor) -> Text:
        """The sequences at index int64 [n]."""
        return Text(self.ids[index], self.places[index])
