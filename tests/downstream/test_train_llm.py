"""Fine-tuning on text that goes on, and what a cache does to how well it is foretold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("peft", reason="peft is missing: pikv[tasks]")
transformers = pytest.importorskip("transformers", reason="transformers is missing: pikv[tasks]")

from downstream_tasks.llm.next_tok_pred import train_llm  # noqa: E402  # after the skips
from downstream_tasks.shared import baselines, results  # noqa: E402
from downstream_tasks.shared.errors import TaskError  # noqa: E402

SHIPPED = Path(train_llm.__file__).parents[2] / "models" / "tiny_moe"
LINES = "".join(f"    total_{number} = sum(values[{number}:], start=offset)\n" for number in range(400))


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def samples(tokenizer: transformers.PreTrainedTokenizerBase) -> list[train_llm.Continuation]:
    """Samples of 300 tokens; every second one ends a little earlier."""
    cut = train_llm.Samples(tokenizer, max_tokens=300, pairs=4)
    made = cut.of(LINES, samples=12, seed=[0])
    shorter = slice(made[0].values[-1].start - len("\n@Q"))
    return [
        each
        if number % 2
        else train_llm.Continuation(
            prompt=each.prompt, answer=each.answer[shorter], text=each.text, values=each.values[:-1]
        )
        for number, each in enumerate(made)
    ]


@pytest.fixture(scope="module")
def rows(samples: list[train_llm.Continuation]) -> list[results.Row]:
    """The shipped model's scores, as it is, with three caches."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    return results.with_each_cache(model, samples, ["int8", "recent@1/4"], train_llm.measure, pad=0)


def test_the_full_cache_foretells_as_the_model_does(
    rows: list[results.Row], samples: list[train_llm.Continuation]
) -> None:
    """A few tokens at a time, with answers of two lengths in a batch: the costs are those of one call, uncached."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    cost, tokens = 0.0, 0
    for sample in samples:
        first, last = len(sample.prompt), len(sample.prompt) + sample.text
        ids = torch.tensor([sample.prompt + sample.answer])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, first - 1 : last - 1]
        cost += torch.nn.functional.cross_entropy(logits, ids[0, first:last], reduction="sum").item()
        tokens += sample.text
    assert rows[0].scores["perplexity"] == pytest.approx(math.exp(cost / tokens), rel=1e-4)
    assert rows[0].scores["recall"] > 0.9


def test_hidden_values_are_lost_with_what_a_cache_forgets(rows: list[results.Row]) -> None:
    """A recent window of a quarter recalls little of what it read long ago; INT8 recalls it."""
    full, int8, recent = rows
    assert int8.scores["recall"] >= full.scores["recall"] - 0.05
    assert recent.scores["recall"] < full.scores["recall"] / 2
    assert full.share == 1 > int8.share > recent.share


def test_a_sample_has_its_values_where_it_says(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Each fits into max_tokens, what is hidden is in the prompt, and no two samples share text."""
    made = train_llm.Samples(tokenizer, max_tokens=200, pairs=3).of(LINES, samples=1000, seed=[1])
    assert all(150 < len(each.prompt) + len(each.answer) <= 200 for each in made)
    for each in made:
        for span in each.values:
            question = tokenizer.decode(each.answer[span.start - 3 : span.stop])
            assert question.startswith("\n@")
            assert question in "\n" + tokenizer.decode(each.prompt)
    texts = {tokenizer.decode(each.answer[: each.text]) for each in made}
    assert len(texts) == len(made)


def test_text_that_is_too_short_is_refused(tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """So is a sample that its pairs would fill."""
    cut = train_llm.Samples(tokenizer, max_tokens=200, pairs=3)
    with pytest.raises(TaskError, match=r"a text of 50 characters is too short for one sample of 170"):
        cut.of("x" * 50, samples=1, seed=[0])
    with pytest.raises(TaskError, match="--max_tokens 60 has no room for --pairs 9 twice"):
        train_llm.Samples(tokenizer, max_tokens=60, pairs=9).of(LINES, samples=1, seed=[0])
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    with pytest.raises(TaskError, match="lacks text and has body; rename its columns to text"):
        train_llm.own(tmp_path / "rows.jsonl")


def test_n_grams_are_probabilities() -> None:
    """What may follow sums to one, and a text that repeats itself is foretold by more than chance."""
    rng = np.random.default_rng(0)
    noise, cycle = rng.integers(0, 4, 400).tolist(), [0, 1, 2, 3] * 100
    grams = baselines.Grams([noise], order=3)
    before = [0, 1]
    costs = [math.log(grams.perplexity([(before, [token])])) for token in (0, 1, 2, 3, 9)]  # 9 stands for all others
    assert sum(math.exp(-cost) for cost in costs) == pytest.approx(1)
    assert baselines.Grams([cycle], order=3).perplexity([([], cycle)]) < 1.2 < 3 < grams.perplexity([([], noise)])


def test_training_on_own_text_lowers_its_perplexity(tmp_path: Path, small_model: Path) -> None:
    """From a text file, through the loop of all tasks, with the model before training and n-grams beside it."""
    (tmp_path / "book.txt").write_text(LINES.replace("\n", "\n\n"))
    sizes = ("--max_tokens", 128, "--train_samples", 64, "--eval_samples", 8, "--batch_size", 8, "--num_epochs", 3)
    line = ("--model", small_model, "--data", tmp_path / "book.txt", *sizes, "--learning_rate", 1e-2, "--cache", "int8")
    train_llm.main([*map(str, line), "--output", str(tmp_path / "out")])
    compared = json.loads((tmp_path / "out" / "results.json").read_text())["compared"]
    assert set(compared) == {"model, full fine-tuning", "model, before training", "6-grams of the tokens trained on"}
    trained, before = (compared[f"model, {name}"] for name in ("full fine-tuning", "before training"))
    assert trained["perplexity"] < before["perplexity"] / 2
    assert "recall" in trained
    assert "| `int8` |" in (tmp_path / "out" / "results.md").read_text()
