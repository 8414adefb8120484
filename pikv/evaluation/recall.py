"""Recall: lines that say a key and its value, hidden in a text, and asked for afterwards."""

from __future__ import annotations

import hashlib
import string
import sysconfig
from pathlib import Path

import numpy as np

from pikv.core.errors import InputError
from pikv.evaluation.items import Item, Question, Task

_KEYS = string.ascii_uppercase + string.digits  # an item hides each at most once
_VALUE_LETTERS = 2


def recall(
    text: str,
    *,
    length: int,
    pairs: int,
    samples: int,
    seed: int,
    depth: float | None = None,
    known: bool = False,
) -> Task:
    """Make a task of passages of `text`, `length` characters each, in which `pairs` lines such as `@Qxy` are hidden.

    depth: where all of them stand, 0 at the beginning to 1 at the end; anywhere if None. known: each item asks for one
    pair only, before the cache is cut.

    Raises InputError for more pairs than there are keys, or than fit; for a text that is too short.
    """
    hidden = pairs * len(_line("Q", "xy"))
    if not 1 <= pairs <= len(_KEYS):
        raise InputError(f"recall: pairs must be from 1 to {len(_KEYS)}, one for each key, got {pairs}")
    if depth is not None and not 0 <= depth <= 1:
        raise InputError(f"recall: depth must be from 0, the beginning, to 1, the end, got {depth}")
    if length <= hidden + 1:
        raise InputError(f"recall: {pairs} pairs need more than {hidden + 1} characters, got length={length}")
    if len(text) < length:
        raise InputError(f"recall: the text has {len(text)} characters, fewer than length={length}; give a longer one")
    rng = np.random.default_rng(seed)
    items = tuple(_item(text, rng, length, pairs, depth, known) for _ in range(samples))
    where = "" if depth is None else f" at depth {depth:g}"
    asked = ", question known" if known else ""
    return Task(name=f"recall of {pairs} pairs in {length} characters{where}{asked}", items=items)


def _line(key: str, value: str) -> str:
    return f"@{key}{value}\n"


def _item(text: str, rng: np.random.Generator, length: int, pairs: int, depth: float | None, known: bool) -> Item:
    keys = rng.choice(list(_KEYS), pairs, replace=False).tolist()
    values = ["".join(letters) for letters in rng.choice(list(string.ascii_lowercase), (pairs, _VALUE_LETTERS))]
    lines = [_line(*pair) for pair in zip(keys, values, strict=True)]
    passage_length = length - len("".join(lines)) - 1
    start = int(rng.integers(len(text) - passage_length))
    rows = text[start : start + passage_length].split("\n")
    places = rng.integers(0, len(rows) + 1, pairs) if depth is None else np.full(pairs, round(depth * len(rows)))
    for place, line in zip(sorted(places.tolist(), reverse=True), lines, strict=True):
        rows.insert(place, line.rstrip("\n"))
    order = rng.permutation(pairs)[: 1 if known else pairs]
    questions = tuple(Question(prompt=f"@{keys[i]}", answer=values[i]) for i in order)
    return Item(context=("\n".join(rows) + "\n").rjust(length, "\n"), questions=_on_lines(questions), known=known)


def _on_lines(questions: tuple[Question, ...]) -> tuple[Question, ...]:
    """Each prompt begins with the end of the line before, so that questions may follow one another."""
    later = (Question(prompt=f"\n{question.prompt}", answer=question.answer) for question in questions[1:])
    return (questions[0], *later)


def standard_library(*, held_out: bool) -> str:
    """All of the Python standard library's sources as one text; one file in ten, chosen by its name, is held out.

    The tables of `encodings` repeat one another, so none of them is held out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__"}
    parts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skipped & set(name.parts) or (held_out and "encodings" in name.parts):
            continue
        if (hashlib.sha256(str(name).encode()).digest()[0] < 26) == held_out:
            parts.append(path.read_text(encoding="utf-8", errors="replace").expandtabs(4))
    return "\n".join(parts)
