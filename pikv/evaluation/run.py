"""The harness: every contestant reads the same texts, is cut, and is asked the same questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from pikv.core.errors import InputError
from pikv.evaluation.contestants import Contestant, Kept
from pikv.evaluation.items import Item, Task


@attrs.frozen(kw_only=True)
class Score:
    """What one contestant did with one item.

    right: how many of its `answers` were wholly the most likely tokens. bits: of all answers together, and `tokens` of
    them. stored, tail: bytes of the cache when the questions began; tail is a part of stored. read: the share of the
    page bytes that the questions' tokens read, index included; 1 without a page selector.
    """

    answers: int
    right: int
    bits: float
    tokens: int
    stored: float
    tail: float
    read: float


@attrs.frozen
class Encoded:
    """An item as token ids: int64 [context], [asked]; and where each answer stands among those that are asked."""

    context: Tensor
    asked: Tensor
    answers: tuple[slice, ...]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Items of one shape may go in one batch."""
        return len(self.context), len(self.asked), tuple((span.start, span.stop) for span in self.answers)


def encode(tokenizer: Any, item: Item) -> Encoded:
    """Token ids of an item. The last token before the questions is asked too: it foretells what comes first.

    Raises InputError for an item whose context has no token, or whose answer has none.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []

    first, *_ = item.questions
    begun = [
        *tokenizer(item.context or first.prompt).input_ids,
        *(ids(first.prompt) if item.known and item.context else []),
    ]
    if len(begun) < 2:
        raise InputError(f"an item needs a context of two tokens or more, got {item.context or first.prompt!r}")
    asked, answers = begun[-1:], []
    for number, question in enumerate(item.questions):
        asked += ids(question.prompt) if number or not item.known else []
        answer = ids(question.answer)
        if not answer:
            raise InputError(f"an item needs an answer of one token or more, got {question.answer!r}")
        answers.append(slice(len(asked), len(asked) + len(answer)))
        asked += answer
    return Encoded(torch.tensor(begun[:-1]), torch.tensor(asked), tuple(answers))


def batches(items: Iterable[tuple[int, Encoded]], most: int) -> Iterator[list[tuple[int, Encoded]]]:
    """Numbered items of one shape together, `most` at a time."""
    waiting: dict[tuple[Any, ...], list[tuple[int, Encoded]]] = {}
    for number, item in items:
        batch = waiting.setdefault(item.shape, [])
        batch.append((number, item))
        if len(batch) == most:
            yield waiting.pop(item.shape)
    yield from waiting.values()


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    contestant: Contestant,
    task: Task,
    *,
    batch: int,
    chunk: int,
    done: frozenset[int] = frozenset(),
    scored: Callable[[int, Score], None],
) -> None:
    """Score a contestant on the items of a task that are not `done`, by their numbers.

    batch: items at a time, of one shape; chunk: tokens of a context at a time. scored: is told each score as it comes.

    Raises InputError for an item that cannot be asked; ConfigError for a contestant that cannot take its place.
    """
    numbered = [(number, encode(tokenizer, item)) for number, item in enumerate(task.items) if number not in done]
    if not numbered:
        return
    with contestant.in_place(model) as kept:
        for group in batches(numbered, batch):
            scores = _answer(model, kept, [item for _, item in group], chunk)
            for (number, _), score in zip(group, scores, strict=True):
                scored(number, score)


def _answer(model: Any, kept: Kept, items: list[Encoded], chunk: int) -> list[Score]:
    device = next(model.parameters()).device
    context, asked = (torch.stack([getattr(item, name) for item in items]).to(device) for name in ("context", "asked"))
    cache = kept.read(model, context, chunk)
    held = kept.held(cache)
    told = torch.cat([model(input_ids=token, past_key_values=cache).logits for token in asked[:, :-1].split(1, 1)], 1)
    read, whole = kept.page_bytes_read(cache) or (1, 1)
    wanted, told = asked[:, 1:], told.float()
    likely = told.argmax(-1) == wanted
    bits = -told.log_softmax(-1).gather(-1, wanted[..., None])[..., 0] / math.log(2)
    spans = [slice(span.start - 1, span.stop - 1) for span in items[0].answers]
    right = torch.stack([likely[:, span].all(1) for span in spans], 1).sum(1)
    spent = torch.stack([bits[:, span].sum(1) for span in spans], 1).sum(1)
    return [
        Score(
            answers=len(spans),
            right=int(right[i]),
            bits=float(spent[i]),
            tokens=sum(span.stop - span.start for span in spans),
            stored=held.total / len(items),
            tail=held.tail / len(items),
            read=read / max(1, whole),
        )
        for i in range(len(items))
    ]
