"""Reading the files that people have: JSONL, CSV, SQuAD JSON, plain text, and folders of `datasets`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from downstream_tasks.shared.errors import TaskError

Row = Mapping[str, Any]
_KNOWN = "a .jsonl, .csv, .json (SQuAD) or .txt file, or a folder that datasets saved"


@attrs.frozen
class Split:
    """Rows to train on, and rows held out."""

    train: Sequence[Row]
    held_out: Sequence[Row]


def load(path: Path, *, columns: Sequence[str]) -> Split:
    """Read --data: a file, a folder of `train.*` and `validation.*` or `test.*`, or a folder of `datasets`.

    A single file is split by the tenth row, so put rows of one document into one file. Every row must have the columns.
    Raises TaskError, which names the file and the row, for data that cannot be read.
    """
    if not path.exists():
        raise TaskError(f"--data {path} does not exist; give {_KNOWN}, or leave --data out")
    split = _folder(path) if path.is_dir() else _tenth(_rows(path), path)
    for name, rows in (("train", split.train), ("validation", split.held_out)):
        if not rows:
            raise TaskError(f"--data {path} has no rows to {name}; a file needs at least 2 rows")
        _check_columns(path, name, rows, columns)
    return split


def _folder(path: Path) -> Split:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _saved_dataset(path)
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in _READERS}
    held_out = next((files[name] for name in ("validation", "dev", "test") if name in files), None)
    if "train" not in files or held_out is None:
        raise TaskError(
            f"--data {path} must have train.* and validation.* (or dev.*, test.*), each {_KNOWN}; it has "
            f"{', '.join(sorted(each.name for each in path.iterdir())) or 'nothing'}"
        )
    return Split(_rows(files["train"]), _rows(held_out))


def _saved_dataset(path: Path) -> Split:
    from datasets import DatasetDict, load_from_disk  # here: it takes a second

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(f"--data {path} must be a folder that datasets saved: {error!r}; save it again") from error
    if not isinstance(loaded, DatasetDict):
        return _tenth(list(loaded), path)
    held_out = next((loaded[name] for name in ("validation", "test") if name in loaded), None)
    if "train" not in loaded or held_out is None:
        raise TaskError(f"--data {path} must have the splits train and validation (or test), it has {list(loaded)}")
    return Split(list(loaded["train"]), list(held_out))


def _tenth(rows: Sequence[Row], path: Path) -> Split:
    if len(rows) < 2:
        raise TaskError(f"--data {path} has {len(rows)} rows; at least 2 are needed, one of them held out")
    every = min(10, len(rows))
    held_out = rows[every - 1 :: every]
    return Split([row for number, row in enumerate(rows) if number % every != every - 1], held_out)


def _rows(path: Path) -> list[Row]:
    if path.suffix not in _READERS:
        raise TaskError(f"--data {path} must be {_KNOWN}, got the suffix {path.suffix!r}")
    try:
        return list(_READERS[path.suffix](path))
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} must be UTF-8 text: {error}; convert it, for instance with iconv") from error


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(
                f"{path}, line {number}: a JSON object was expected, got {line[:40]!r} ({error})"
            ) from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {number}: a JSON object was expected, got {line[:40]!r}")
        yield row


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            if None in row or None in row.values():
                raise TaskError(f"{path}, row {number}: as many fields as the header has were expected; quote commas")
            yield row


def _squad(path: Path) -> Iterator[Row]:
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = [answer["text"] for answer in asked["answers"]]
                    yield {"context": paragraph["context"], "question": asked["question"], "answers": answers}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise TaskError(
            f"{path} must be SQuAD JSON, data > paragraphs > qas > answers > text: {error!r}; other JSON goes into "
            ".jsonl, an object a line"
        ) from error


def _text(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8")
    yield from ({"text": part} for part in text.split("\n\n") if part.strip())


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _csv,
    ".json": _squad,
    ".jsonl": _jsonl,
    ".txt": _text,
}


def _check_columns(path: Path, split: str, rows: Sequence[Row], columns: Sequence[str]) -> None:
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if row.get(column) in (None, "")]
        if missing:
            raise TaskError(
                f"--data {path}, {split} row {number} lacks {', '.join(missing)} and has {', '.join(row)}; "
                f"rename its columns to {', '.join(columns)}"
            )
