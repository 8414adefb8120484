"""Files that people have, read or refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="peft is missing: pikv[tasks]")

from downstream_tasks.shared import loaders  # after the skip
from downstream_tasks.shared.errors import TaskError

ROWS = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(20)]
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "Ada wrote it in 1843.",
                    "qas": [
                        {"question": "Who?", "answers": [{"text": "Ada"}]},
                        {"question": "When?", "answers": [{"text": "in 1843"}, {"text": "1843"}]},
                    ],
                }
            ]
        }
    ]
}


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def as_csv() -> str:
    return "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)


@pytest.mark.parametrize(("name", "text"), [("rows.jsonl", "\n".join(map(json.dumps, ROWS))), ("rows.csv", as_csv())])
def test_one_file_is_split_by_the_tenth_row(tmp_path: Path, name: str, text: str) -> None:
    """JSONL and CSV have the same rows; none is on both sides."""
    split = loaders.load(written(tmp_path, name, text), columns=("text", "label"))
    assert list(split.held_out) == [ROWS[9], ROWS[19]]
    assert list(split.train) == [row for row in ROWS if row not in split.held_out]


def test_squad_has_a_row_a_question(tmp_path: Path) -> None:
    """All accepted answers of a question are kept."""
    split = loaders.load(written(tmp_path, "dev.json", json.dumps(SQUAD)), columns=("context", "question"))
    assert split.train[0] == {"context": "Ada wrote it in 1843.", "question": "Who?", "answers": ["Ada"]}
    assert split.held_out[0]["answers"] == ["in 1843", "1843"]


def test_plain_text_has_a_row_a_paragraph(tmp_path: Path) -> None:
    """Empty lines separate them."""
    split = loaders.load(written(tmp_path, "book.txt", "one\nmore\n\ntwo\n\n\n"), columns=("text",))
    assert [row["text"] for row in (*split.train, *split.held_out)] == ["one\nmore", "two"]


def test_a_folder_says_what_is_held_out(tmp_path: Path) -> None:
    """train.* and validation.* are taken as they are."""
    written(tmp_path, "train.jsonl", json.dumps(ROWS[0]))
    written(tmp_path, "validation.csv", as_csv())
    split = loaders.load(tmp_path, columns=("text", "label"))
    assert (list(split.train), list(split.held_out)) == (ROWS[:1], ROWS)


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    """With splits, and without."""
    datasets = pytest.importorskip("datasets", reason="datasets is missing: pikv[tasks]")
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole, "test": whole.select([3])}).save_to_disk(str(tmp_path / "split"))
    whole.save_to_disk(str(tmp_path / "whole"))
    assert list(loaders.load(tmp_path / "split", columns=("text",)).held_out) == [ROWS[3]]
    assert list(loaders.load(tmp_path / "whole", columns=("text",)).held_out) == [ROWS[9], ROWS[19]]


def test_a_folder_of_datasets_that_is_damaged(tmp_path: Path) -> None:
    """A table that is gone is an error of --data."""
    datasets = pytest.importorskip("datasets", reason="datasets is missing: pikv[tasks]")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path))
    next(tmp_path.glob("*.arrow")).unlink()
    with pytest.raises(TaskError, match=r"must be a folder that datasets saved: .*; save it again"):
        loaders.load(tmp_path, columns=("text",))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "rows.jsonl",
            '{"text": "a", "label": "b"}\n{"text": ',
            r"rows.jsonl, line 2: a JSON object was expected, got",
        ),
        ("rows.jsonl", "[1]\n[2]", r"line 1: a JSON object was expected, got '\[1\]'"),
        ("rows.jsonl", '{"text": "a"}\n{"text": "b"}', "train row 1 lacks label and has text; rename its columns to"),
        ("rows.jsonl", '{"text": "a", "label": "b"}', "has 1 rows; at least 2 are needed"),
        ("rows.csv", "text,label\na,b,c\n", "rows.csv, row 2: as many fields as the header has"),
        ("rows.json", '{"rows": []}', "must be SQuAD JSON, data > paragraphs > qas"),
        ("rows.parquet", "x", r"must be a .jsonl, .csv, .json .SQuAD. or .txt file, .* got the suffix '.parquet'"),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    """The message names the file, the row, and what to do."""
    with pytest.raises(TaskError, match=message):
        loaders.load(written(tmp_path, name, text), columns=("text", "label"))


def test_data_that_is_not_there(tmp_path: Path) -> None:
    """A missing file, text that is no UTF-8, and a folder without splits are named."""
    with pytest.raises(TaskError, match=r"does not exist; give a .jsonl"):
        loaders.load(tmp_path / "no.csv", columns=("text",))
    with pytest.raises(TaskError, match="must have train"):
        loaders.load(tmp_path, columns=("text",))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n\nb")
    with pytest.raises(TaskError, match="must be UTF-8 text"):
        loaders.load(tmp_path / "latin.txt", columns=("text",))
