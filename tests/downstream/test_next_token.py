"""The data and the training of the small model that the examples and benchmarks use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import generate_data
import numpy as np
import pytest

TASK = Path(generate_data.__file__).parent
SHIPPED = Path(__file__).parents[2] / "downstream_tasks" / "models" / "tiny_moe"


@pytest.fixture(scope="module")
def text() -> str:
    """Text that the model never saw."""
    return generate_data.standard_library(held_out=True)


def test_a_sample_hides_pairs_and_asks_for_each(text: str) -> None:
    """The context has the stated length and every pair once; the questions repeat the pairs, and answers are marked."""
    sample = generate_data.recall_sample(text, np.random.default_rng(1), length=700, pairs=9)
    context, questions = sample.text[: sample.question_start], sample.text[sample.question_start :]
    assert len(context) == 700
    lines = questions.splitlines()
    assert len(lines) == len(set(lines)) == len(sample.answers) == 9
    for line, span in zip(lines, sample.answers, strict=True):
        assert context.count(line) == 1
        assert sample.text[span] == line[2:]


def test_too_many_pairs_are_refused(text: str) -> None:
    """Pairs that do not fit are an error that says how many characters they need."""
    with pytest.raises(ValueError, match="9 pairs need more than 40 characters"):
        generate_data.recall_sample(text, np.random.default_rng(1), length=40, pairs=9)


def test_what_is_hidden_is_asked_for_after_more_text(text: str) -> None:
    """The first half hides all pairs, and nothing else of the passage is changed."""
    passage = text[3000:3600]
    made = generate_data.continued(passage, np.random.default_rng(4), pairs=5)
    assert len(set(made.asked)) == 5
    assert all(f"{question}{value}\n" in "\n" + made.read for question, value in made.asked)
    kept = [line for line in made.read.split("\n") if f"\n{line}" not in {"".join(pair) for pair in made.asked}]
    assert "\n".join(kept) + made.follows == passage[:300] + "\n" + passage[300:]


def test_rows_mark_their_answers(text: str) -> None:
    """A row is a sample of exactly the stage's length, and the marked tokens are letters."""
    stage = generate_data.Stage(length=400, pairs=(2, 5), samples=6)
    ids, answers = generate_data.recall_rows(text, np.random.default_rng(2), stage)
    assert ids.shape == answers.shape == (6, 400)
    letters = generate_data.token_ids("abcdefghijklmnopqrstuvwxyz")
    assert np.isin(ids[answers], letters).all()
    assert ((answers.sum(1) % 2 == 0) & (answers.sum(1) >= 4)).all()


def test_held_out_files_are_not_trained_on(text: str) -> None:
    """No passage of the held-out text is in the training text, beyond what files share."""
    training = generate_data.standard_library(held_out=False)
    rng = np.random.default_rng(3)
    passages = [text[start : start + 400] for start in rng.integers(len(text) - 400, size=50)]
    assert sum(passage in training for passage in passages) <= 2


def test_the_tokenizer_gives_the_ids_of_the_data() -> None:
    """The tokenizer that is saved with a model and the data's own table agree, unknown characters included."""
    train_from_scratch = pytest.importorskip(
        "train_from_scratch", reason="transformers and accelerate are missing: pikv[tasks]"
    )
    sample = "def f(x):\n    return '\u00e9' + x  # ~@{}\n"
    tokenizer = train_from_scratch.character_tokenizer()
    assert tokenizer.encode(sample) == generate_data.token_ids(sample).tolist()
    assert tokenizer.decode(tokenizer.encode("if x > 1:\n    pass\n")) == "if x > 1:\n    pass\n"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TASK / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_data_and_training_run_from_end_to_end(tmp_path: Path, text: str) -> None:
    """The two commands of the docs, on a thousandth of the data, give a folder that transformers loads."""
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pikv[tasks]")
    made = run("generate_data.py", "--output", tmp_path / "data", "--scale", 0.0001)
    assert made.returncode == 0, made.stderr
    line = ("--data", tmp_path / "data", "--output", tmp_path / "model", "--report_samples", 1)
    trained = run("train_from_scratch.py", *line)
    assert trained.returncode == 0, trained.stderr
    described = json.loads((tmp_path / "model" / "report.json").read_text())
    assert described["parameters"] == 1_014_912
    assert (tmp_path / "data" / "validation.txt").read_text() == text
    assert 0 < described["measures"]["bits per character, held-out text"] < 20
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.num_parameters() == described["parameters"]


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Training from scratch without stages ends with one line and exit code 2."""
    pytest.importorskip("transformers", reason="transformers is missing: pikv[tasks]")
    done = run("train_from_scratch.py", "--data", tmp_path, "--output", tmp_path / "model")
    assert done.returncode == 2
    assert "has no curriculum.json; run generate_data.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_shipped_model_recalls() -> None:
    """It recalls 95 % of 8 pairs in 2048 characters of text that it never saw, as its report says."""
    train_from_scratch = pytest.importorskip(
        "train_from_scratch", reason="transformers and accelerate are missing: pikv[tasks]"
    )
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pikv[tasks]")
    reported = json.loads((SHIPPED / "report.json").read_text())["measures"]
    assert reported["recall of 8 pairs in 2048 characters"] >= 0.95
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED).float().eval()
    assert train_from_scratch.recall_accuracy(model, length=2048, pairs=8, samples=25) >= 0.95
