"""Scores on disk, one line each, so that a run which was cut short goes on where it ended."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import attrs

from pikv.core.errors import InputError
from pikv.evaluation.run import Score


@attrs.define
class Results:
    """The scores of one run, by contestant, task and number of the item.

    path: a JSONL file, made if missing; None keeps them in memory only. Scores that were made with other settings are
    not taken for those of this run: `key` is a digest of what an item's score depends on.
    """

    path: Path | None = None
    _scores: dict[tuple[str, str, str], dict[int, Score]] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # cut short by a kill; what is added next begins a line of its own
            self.path.write_text("".join(lines[:-1]))
            lines.pop()
        for number, line in enumerate(lines, start=1):
            self._read(number, line)

    def _read(self, number: int, line: str) -> None:
        try:
            row = json.loads(line)
            self.of(row["contestant"], row["task"], row["key"])[row["item"]] = Score(**row["score"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}, line {number}: is no score of this command ({error}); name another output folder, or "
                "move the file away"
            ) from error

    def of(self, contestant: str, task: str, key: str) -> dict[int, Score]:
        """The scores of a contestant on a task, by the number of the item."""
        return self._scores.setdefault((contestant, task, key), {})

    def add(self, contestant: str, task: str, key: str, item: int, score: Score) -> None:
        """Keep a score, on disk at once."""
        self.of(contestant, task, key)[item] = score
        if self.path is not None:
            row = {"contestant": contestant, "task": task, "key": key, "item": item, "score": attrs.asdict(score)}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def key_of(*settings: Any) -> str:
    """A digest of settings that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
