"""`pikv eval` on the shipped model, as a user types it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pikv.cli.main import main
from pikv.evaluation import run
from pikv.evaluation.items import Item, Question
from pikv.evaluation.results import Results
from pikv.evaluation.run import encode

MODEL = str(Path(__file__).parents[2] / "downstream_tasks" / "models" / "tiny_moe")
SMALL = ["--length", "256", "--samples", "3", "--pairs", "4", "--batch", "2", "--dtype", "float32"]
CUT = "recent(sinks=0,recent=16)+page_size=16+tail_tokens=16@1/8"


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return {(row["task"], row["contestant"]): row for row in csv.DictReader(file)}


def evaluate(folder: Path, *more: str) -> int:
    return main(["eval", MODEL, *SMALL, "--output", str(folder), *more])


def test_exact_is_full_and_what_is_cut_has_lost(tmp_path, capsys):
    """The model recalls with the full cache and with exact pages alike, and not what a short window has dropped."""
    assert evaluate(tmp_path, "--cache", "exact", "--cache", f"cut: {CUT}", "--task", "recall", "--task", "text") == 0
    rows = rows_of(tmp_path)
    recall, text = dict.fromkeys(task for task, _ in rows)
    assert float(rows[recall, "full"]["quality"]) > 80
    assert rows[recall, "exact"]["quality"] == rows[recall, "full"]["quality"]
    assert float(rows[recall, "cut"]["lost"]) > 30
    assert float(rows[text, "exact"]["lost"]) == pytest.approx(0, abs=1e-4)
    assert float(rows[text, "cut"]["lost"]) > 0
    assert float(rows[recall, "cut"]["stored"]) < 0.5 < float(rows[recall, "exact"]["stored"])
    assert "| cut" in capsys.readouterr().out
    assert "| cut" in (tmp_path / "results.md").read_text()


def test_a_run_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    """What was scored is not scored again, a line cut short by a kill is; other settings begin anew."""
    assert evaluate(tmp_path) == 0
    first, scores = rows_of(tmp_path), tmp_path / "scores.jsonl"
    scores.write_text(scores.read_text()[:-20])
    asked = []
    answer = run._answer
    monkeypatch.setattr(
        run, "_answer", lambda model, kept, items, chunk: asked.append(len(items)) or answer(model, kept, items, chunk)
    )
    assert evaluate(tmp_path) == 0
    assert asked == [1]
    assert rows_of(tmp_path) == first
    assert evaluate(tmp_path) == 0
    assert asked == [1]
    assert evaluate(tmp_path, "--seed", "5") == 0
    assert asked == [1, 2, 1]
    assert json.loads(scores.read_text().splitlines()[0])["contestant"] == "full"


def test_own_questions(tmp_path, capsys):
    """A JSONL file of prompts and answers; --json prints rows."""
    questions = tmp_path / "own.jsonl"
    lines = [
        {"context": "@Qab\nimport os\n" * 4, "prompt": "@Q", "answer": "ab"},
        {"prompt": "x = 1\ny =", "answer": " 2"},
    ]
    questions.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert evaluate(tmp_path / "out", "--task", str(questions), "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["items"] == 2
    assert row["quality"] >= 50


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cache", "int5"], "int5"),
        (["--cache", "int4@2"], "share"),
        (["--task", "recal"], "recall, text or a .jsonl"),
        (["--pairs", "99"], "pairs"),
        (["--depth", "2"], "depth"),
        (["--length", "9"], "length"),
        (["--samples", "0"], "--samples"),
        (["--dtype", "float23"], "--dtype"),
        (["--press", "Knorm"], "KnormPress:0.9"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--cache", "recent@1/100"], "budget_tokens"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, tmp_path, capsys):
    """Exit code 2, and what to mend; no traceback."""
    assert evaluate(tmp_path, *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "a"}', '{"answer": "a"}', '{"prompt": 1, "answer": "a"}'])
def test_a_line_that_is_no_question(line, tmp_path, capsys):
    """Is named by its number."""
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line)
    assert evaluate(tmp_path, "--task", str(path)) == 2
    assert "line 2" in capsys.readouterr().err


def test_scores_of_another_program(tmp_path, capsys):
    """Are not read as scores."""
    (tmp_path / "scores.jsonl").write_text('{"a": 1}\n')
    assert evaluate(tmp_path) == 2
    assert "line 1" in capsys.readouterr().err
    assert Results().of("full", "t", "k") == {}


def test_what_is_read_before_the_cut():
    """All of the context but its last token; of a question that is known its prompt too."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    question = Question(prompt="@Q", answer="ab")
    later, known = (
        encode(tokenizer, Item(context="xyz", questions=(question,), known=known)) for known in (False, True)
    )
    text = tokenizer("xyz@Qab").input_ids
    assert later.context.tolist() == text[:2]
    assert known.context.tolist() == text[:4]
    for item in (later, known):
        assert [*item.context.tolist(), *item.asked.tolist()] == text
        assert item.asked[item.answers[0]].tolist() == text[-2:]
