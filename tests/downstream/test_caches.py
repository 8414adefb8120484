"""What a cache does to answers: prompts read into compositions, and questions answered from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="peft is missing: pikv[tasks]")
transformers = pytest.importorskip("transformers", reason="transformers is missing: pikv[tasks]")

import numpy as np  # noqa: E402  # after the skips

from downstream_tasks.qa import train as qa  # noqa: E402
from downstream_tasks.shared import baselines, caches, results, sources  # noqa: E402
from downstream_tasks.shared.errors import TaskError  # noqa: E402
from downstream_tasks.shared.examples import Encoder, Example  # noqa: E402
from downstream_tasks.text_classification import train as classification  # noqa: E402
from pikv import ConfigError, UnknownNameError  # noqa: E402

SHIPPED = Path(qa.__file__).parents[1] / "models" / "tiny_moe"
PASSAGE = "axis : int, optional\n    The axis to sum over.\n" * 3 + "out : ndarray\n    Where it goes.\n"


@pytest.fixture(scope="module")
def facts() -> list[Example]:
    """Questions for facts hidden in passages, of different lengths, as the shipped model's tokenizer has them."""
    tokenizer, rng = transformers.AutoTokenizer.from_pretrained(SHIPPED), np.random.default_rng(0)
    encode = Encoder(tokenizer, max_tokens=400)
    return [encode(qa.fact_item(PASSAGE[number:] * 2, rng)) for number in range(24)]


@pytest.fixture(scope="module")
def rows(facts: list[Example]) -> list[results.Row]:
    """The shipped model's scores, as it is, with three caches."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    answers = qa.Answers(transformers.AutoTokenizer.from_pretrained(SHIPPED))
    return results.with_each_cache(model, facts, ["int8", "recent@1/10"], answers, pad=0)


def test_the_full_cache_answers_as_the_model_does(rows: list[results.Row], facts: list[Example]) -> None:
    """Padded batches of prompts, read through PiKV, are answered as transformers generates one prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    right = 0
    for example in facts:
        ids = torch.tensor([example.prompt])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)[0, -2:]
        right += written.tolist() == example.answer[:-1]
    assert rows[0].scores["exact match"] == right / len(facts)
    assert right / len(facts) > 0.9


def test_what_a_cache_forgets_is_not_answered(rows: list[results.Row]) -> None:
    """INT8 answers as the full cache does; a recent window of a tenth does not, and both are smaller."""
    full, int8, recent = rows
    assert int8.scores["exact match"] >= full.scores["exact match"] - 0.05
    assert recent.scores["exact match"] < full.scores["exact match"] / 2
    assert full.share == 1 > int8.share > recent.share


def test_compositions_come_from_the_line_or_a_file(tmp_path: Path) -> None:
    """A file has one a line; the full cache is first and measured once."""
    (tmp_path / "caches.txt").write_text("# low bits\nint8  # half\n\nquest(pages=8)+int4\n")
    named = caches.compositions([str(tmp_path / "caches.txt"), "exact", "int8"])
    assert [each.text for each in named] == ["exact", "int8", "quest(pages=8)+int4"]
    assert [each.text for each in caches.compositions(None)] == ["exact", *caches.DEFAULTS]


def test_a_composition_that_does_not_exist_is_refused_before_training(tmp_path: Path) -> None:
    """The message lists what there is, and nothing is written."""
    with pytest.raises(UnknownNameError, match="no part is called 'int5'"):
        qa.main(["--output", str(tmp_path / "out"), "--cache", "int5"])
    with pytest.raises(ConfigError, match="share"):
        qa.main(["--output", str(tmp_path / "out"), "--cache", "recent@2"])
    assert not (tmp_path / "out").exists()


def test_answers_are_compared_as_squad_does() -> None:
    """Case, articles and punctuation do not count; F1 is of words, the best over the accepted answers."""
    assert qa.scores(["The Axis,"], [["axis"]]) == {"exact match": 1.0, "F1": 1.0}
    assert qa.scores(["int value"], [["float", "int"]]) == {"exact match": 0.0, "F1": pytest.approx(2 / 3)}


def test_an_entry_is_asked_for_by_its_label() -> None:
    """Only labels that the passage has once are asked for; the answer is the rest of the line."""
    made = qa.entry_item(PASSAGE, np.random.default_rng(0))
    assert made is not None
    assert (made.question, made.answer) == ("\n@out : ", "ndarray\n")
    assert qa.entry_item("nothing here", np.random.default_rng(0)) is None


def test_baselines_need_no_model() -> None:
    """The answer of the same question before, and the line with most of its words."""
    asked = [qa.item(PASSAGE, "axis : ", ["int, optional"]), qa.item(PASSAGE, "out : ", ["ndarray"])]
    assert baselines.looked_up(asked[:1], asked) == ["int, optional", "int, optional"]
    assert baselines.best_line(asked) == ["axis : int, optional", "out : ndarray"]


def test_no_file_is_on_both_sides() -> None:
    """Passages to train on and passages held out come from different files, beyond what files share."""
    held_out = classification.passages(samples=40, held_out=True, characters=200, seed=0)
    train = classification.passages(samples=400, held_out=False, characters=200, seed=0)
    assert {package for _, package in held_out} == set(classification.PACKAGES)
    assert len({text for text, _ in held_out} & {text for text, _ in train}) <= 4  # licences


def test_flags_are_chosen_by_files_that_are_not_the_test_s() -> None:
    """Files held out for validation are of those that are trained on otherwise, and are not trained on."""
    parts = {
        (held_out, validation): {
            each.name for each in sources.split(["networkx"], held_out=held_out, validation=validation)
        }
        for held_out in (False, True)
        for validation in (False, True)
    }
    assert parts[True, True] | parts[False, True] == parts[False, False]
    assert parts[True, True]
    assert not parts[True, True] & parts[False, True]
    assert not parts[True, False] & parts[False, False]


def test_a_question_survives_a_long_context() -> None:
    """A context that does not fit loses its end; question and answer stay."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    example = Encoder(tokenizer, max_tokens=50)(qa.item("x" * 200, "key?", ["yes"]))
    assert len(example.prompt) + len(example.answer) == 50
    assert tokenizer.decode(example.prompt).endswith("x\n@key?")


def test_what_a_model_is_compared_with_reads_no_more() -> None:
    """An item is cut to the context that its example has; one that fits stays as it is."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    encode, long, short = (
        Encoder(tokenizer, max_tokens=50),
        qa.item("x" * 200, "key?", ["yes"]),
        qa.item("x", "k", ["y"]),
    )
    assert encode.cut(long).context + long.question == tokenizer.decode(encode(long).prompt)
    assert encode.cut(short) is short


def test_squad_without_answers_is_refused(tmp_path: Path) -> None:
    """Rows that have neither answer nor answers cannot be trained on."""
    rows = [json.dumps({"context": "c", "question": "q"})] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(TaskError, match="needs an answer, or answers, in each row"):
        qa.own(tmp_path / "rows.jsonl")
