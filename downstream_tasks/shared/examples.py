"""What a model reads and what it should write, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers leaves out of a loss


@attrs.frozen
class Item:
    """A context, what is asked of it, the text to write, and all the answers that count as right."""

    context: str
    question: str
    answer: str
    accepted: tuple[str, ...]


@attrs.frozen
class Example:
    """An item as token ids: what is read, and what should be written."""

    prompt: list[int]
    answer: list[int]
    accepted: tuple[str, ...] = ()


class Encoder:
    """Turns items into examples of at most max_tokens. A context that is too long loses its end, never the question."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._start: list[int] = tokenizer("").input_ids  # what the tokenizer puts before every text, mostly nothing

    def __call__(self, item: Item) -> Example:
        """The example of an item."""
        question, answer = self._ids(item.question), self._ids(item.answer)
        return Example([*self._start, *self._ids(item.context)[: self._room(item)], *question], answer, item.accepted)

    def cut(self, item: Item) -> Item:
        """The item with as much of its context as is read, so that whatever a model is compared with reads no more."""
        context, room = self._ids(item.context), self._room(item)
        return item if len(context) <= room else attrs.evolve(item, context=self._tokenizer.decode(context[:room]))

    def _room(self, item: Item) -> int:
        """For the context, in tokens."""
        rest = len(self._ids(item.question)) + len(self._ids(item.answer))
        return max(0, self._max_tokens - len(self._start) - rest)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


class Rows(Dataset[dict[str, Any]]):
    """Examples as transformers' collators take them; only what is to be written has labels."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self._examples[index]
        labels = [IGNORED] * len(example.prompt) + example.answer
        return {"input_ids": example.prompt + example.answer, "labels": labels}
