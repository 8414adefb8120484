"""What is done to a model and its cache, one operation after another, as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import attrs
import torch
from torch import Tensor
from transformers import Cache


class Dialogue(Protocol):
    """A cache, and the mask int64 [batch, columns] of what it was shown: 0 where it was padding."""

    cache: Cache
    mask: Tensor

    def show(self, real: Tensor) -> list[Tensor]:
        """Show random tokens, int64 `real` [batch, columns] being 0 at padding; return what came of it."""


class Operation(Protocol):
    """Something that users of a cache do with it."""

    def apply(self, dialogue: Dialogue) -> list[Tensor]:
        """Do it; return what came of it, nothing unless tokens were shown."""


@attrs.frozen
class Feed:
    """Show `tokens` columns in one chunk. padding: columns of each row that are none; on which side they are."""

    tokens: int
    padding: Sequence[int] = ()
    side: Literal["left", "right"] = "left"

    def apply(self, dialogue: Dialogue) -> list[Tensor]:
        """Show them."""
        padding = torch.tensor(self.padding or [0] * len(dialogue.mask))[:, None]
        left = torch.arange(self.tokens) >= padding
        return dialogue.show((left if self.side == "left" else left.flip(-1)).long())


@attrs.frozen
class Reorder:
    """Row i goes on as row `rows[i]` was: what beam search does."""

    rows: Sequence[int]

    def apply(self, dialogue: Dialogue) -> list[Tensor]:
        """Nothing is shown."""
        dialogue.cache.reorder_cache(torch.tensor(self.rows))
        dialogue.mask = dialogue.mask[list(self.rows)]
        return []


@attrs.frozen
class Select:
    """Keep the rows `rows`, in that order; there may be fewer than before."""

    rows: Sequence[int]

    def apply(self, dialogue: Dialogue) -> list[Tensor]:
        """Nothing is shown."""
        dialogue.cache.batch_select_indices(torch.tensor(self.rows))
        dialogue.mask = dialogue.mask[list(self.rows)]
        return []


@attrs.frozen
class Repeat:
    """Each row becomes `times` rows, side by side."""

    times: int

    def apply(self, dialogue: Dialogue) -> list[Tensor]:
        """Nothing is shown."""
        dialogue.cache.batch_repeat_interleave(self.times)
        dialogue.mask = dialogue.mask.repeat_interleave(self.times, dim=0)
        return []


@attrs.frozen
class Crop:
    """Forget the newest `tokens` columns."""

    tokens: int

    def apply(self, dialogue: Dialogue) -> list[Tensor]:
        """Nothing is shown."""
        dialogue.cache.crop(-self.tokens)  # the sign that means the same in every version
        dialogue.mask = dialogue.mask[:, : -self.tokens]
        return []


@attrs.frozen
class Program:
    """Operations, beginning with a Feed of `batch` rows; the tokens come from `seed`."""

    operations: Sequence[Operation]
    batch: int = 3
    seed: int = 0

    def no_tokens(self) -> Tensor:
        """The mask before anything was shown."""
        return torch.zeros(self.batch, 0, dtype=torch.int64)

    def random(self) -> torch.Generator:
        """Where the tokens come from."""
        return torch.Generator().manual_seed(self.seed)

    def run(self, dialogue: Dialogue) -> list[Answer]:
        """Do one operation after another."""
        return [Answer.to(operation, dialogue) for operation in self.operations]


@attrs.frozen
class Answer:
    """What came of an operation, and the length that the cache states after it."""

    operation: Operation
    shown: list[Tensor]
    length: int

    @classmethod
    def to(cls, operation: Operation, dialogue: Dialogue) -> Answer:
        """Do the operation."""
        shown = operation.apply(dialogue)
        return cls(operation, shown, int(dialogue.cache.get_seq_length()))
