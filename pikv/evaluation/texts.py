"""Tasks made of a user's own texts: how well what follows is foretold, and questions with answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pikv.core.errors import InputError
from pikv.evaluation.items import Item, Question, Task


def continuation(text: str, *, length: int, follow: int, samples: int, seed: int) -> Task:
    """Passages of a text, `length` characters each, judged by the bits of the `follow` characters after them.

    Raises InputError for a text that is too short.
    """
    if len(text) < length + follow:
        raise InputError(
            f"text: {length} characters and {follow} after them need a longer text, got {len(text)} characters"
        )
    starts = np.random.default_rng(seed).integers(len(text) - length - follow + 1, size=samples)
    items = tuple(
        Item(
            context=text[start : start + length],
            questions=(Question(prompt="", answer=text[start + length : start + length + follow]),),
        )
        for start in starts.tolist()
    )
    return Task(name=f"text after {length} characters", items=items, judged_by="bits")


def from_jsonl(path: Path) -> Task:
    """The items of a file: in each line an object with `answer`, and `prompt`, `context` or both.

    A prompt without a context is read whole before the cache is cut, as a question that is known then. With a context
    the cache is cut after it, and the prompt comes later; `"known": true` has it read before.

    Raises InputError with the number of a line that is no such object.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    items = [_item(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise InputError(f"{path}: holds no line; each is an object with `prompt` and `answer`")
    return Task(name=path.stem, items=tuple(items))


def _item(path: Path, number: int, line: str) -> Item:
    wanted = 'an object such as {"context": "...", "prompt": "...", "answer": "..."}, context or prompt left out'
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: must be {wanted}; it is no JSON: {error}") from error
    texts = {key: given.get(key, "") for key in ("context", "prompt", "answer")} if isinstance(given, dict) else {}
    if not texts or not all(isinstance(text, str) for text in texts.values()):
        raise InputError(f"{path}, line {number}: must be {wanted}, got {line[:80]!r}")
    if not texts["answer"] or not (texts["context"] or texts["prompt"]):
        raise InputError(f"{path}, line {number}: needs an `answer`, and a `prompt` or a `context`, got {line[:80]!r}")
    question = Question(prompt=texts["prompt"], answer=texts["answer"])
    return Item(context=texts["context"], questions=(question,), known=bool(given.get("known", not texts["context"])))
