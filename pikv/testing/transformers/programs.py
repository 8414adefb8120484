"""What is done to a model and its cache, one operation after another, as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pikv.testing.transformers.models import VOCABULARY, cache_argument


class Dialogue(Protocol):
    """A cache, and the mask int64 [batch, columns] of what it was shown: 0 where it was padding."""

    cache: Cache
    mask: Tensor

    def show(self, real: Tensor) -> list[Tensor]:
        """Show random tokens, int64 `real` [batch, columns] being 0 at padding; return what came of it."""


@attrs.define
class ModelDialogue:
    """Tokens are shown to a model that has the cache. What comes of it is logits."""

    model: PreTrainedModel
    cache: Cache
    mask: Tensor
    random: torch.Generator

    @classmethod
    def start(cls, model: PreTrainedModel, cache: Cache, program: Program) -> ModelDialogue:
        """Nothing was shown yet."""
        return cls(model, cache, program.no_tokens(), program.random())

    def show(self, real: Tensor) -> list[Tensor]:
        """Call the model once; the logits float32 [tokens, vocabulary] of tokens that are no padding."""
        ids = torch.randint(1, VOCABULARY, real.shape, generator=self.random)  # padding is any token, to be ignored
        self.mask = torch.cat([self.mask, real], -1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -real.shape[1] :]
        named = {cache_argument(self.model): self.cache}
        with torch.no_grad():
            logits = self.model(ids, attention_mask=self.mask, position_ids=positions, **named).logits
        return [logits[real.bool()].float()]


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


@st.composite
def programs(draw: DrawFn, *, max_operations: int = 6) -> Program:
    """Any mixture of operations, with padding on either side and chunks that are longer than a page."""
    first = batch = draw(st.integers(1, 3))
    operations: list[Operation] = [_feed(draw, batch)]
    columns = operations[0].tokens
    for _ in range(draw(st.integers(1, max_operations))):
        rows = st.integers(0, batch - 1)
        kind = draw(st.sampled_from([Feed, Feed, Reorder, Select, Repeat, Crop]))
        if kind is Reorder:
            operations.append(Reorder(draw(st.lists(rows, min_size=batch, max_size=batch))))
        elif kind is Select:
            operations.append(Select(draw(st.lists(rows, min_size=1, max_size=batch))))
            batch = len(operations[-1].rows)
        elif kind is Repeat and batch <= 2:
            operations.append(Repeat(draw(st.integers(1, 3))))
            batch *= operations[-1].times
        elif kind is Crop and columns > 1:
            operations.append(Crop(draw(st.integers(1, columns - 1))))
            columns -= operations[-1].tokens
        else:
            operations.append(_feed(draw, batch))
            columns += operations[-1].tokens
    return Program([*operations, Feed(1), Feed(2)], first, draw(st.integers(0, 2**16)))


def _feed(draw: DrawFn, batch: int) -> Feed:
    """A chunk in which each row has a token at least."""
    tokens = draw(st.sampled_from([1, 1, 2, 5, 9, 17, 70]))
    padding = draw(st.none() | st.lists(st.integers(0, tokens - 1), min_size=batch, max_size=batch))
    return Feed(tokens, padding or (), draw(st.sampled_from(["left", "right"])))
