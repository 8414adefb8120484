r"""Train a causal model to answer questions with words of a passage, and see what a cache does to its answers.

    python downstream_tasks/qa/train.py --output /tmp/qa
    python downstream_tasks/qa/train.py --output /tmp/qa_lora --use_lora --learning_rate 1e-2
    python downstream_tasks/qa/train.py --data dev-v2.0.json --model YOUR_MODEL --output /tmp/squad

The model reads `{context}\n@{question}` and writes the answer and a line's end. Without --data the passages are
documentation of installed packages, and files, not passages, are held out. Half of the questions are for an entry of
the documentation (`axis : ` is answered by the rest of its line), half for a hidden fact (a line `@Kxy` hides the
answer to `K`). Your own data is SQuAD JSON, or has the columns context, question and answer (or answers).
"""

from __future__ import annotations

import argparse
import functools
import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[2]))  # scripts are run by their path

from downstream_tasks.shared import baselines, flags, loaders, sources
from downstream_tasks.shared.caches import Read, Reader, more
from downstream_tasks.shared.errors import TaskError, exit_with
from downstream_tasks.shared.examples import Encoder, Example, Item
from downstream_tasks.shared.results import Scores
from downstream_tasks.shared.run import Task, run, split

PACKAGES = ("networkx", "numpy", "python", "scipy", "sklearn", "sympy", "torch")
ENTRY = re.compile(
    r"^ *(?P<question>[A-Za-z_]\w{1,20}(?:\s\([\w ,]{1,20}\))? ?(?::|=|--) )(?P<answer>\S[^\n]{0,30}\S)$", re.M
)
KEYS = string.ascii_uppercase + string.digits
HIDDEN, VALUE_LETTERS = 4, 2  # facts in a passage, and the letters of an answer
FROM_A_FILE = 16  # passages at most
END = "\n"  # what ends an answer
LONGEST_ANSWER = 48  # tokens


def item(context: str, question: str, answers: Sequence[str]) -> Item:
    """A question as the model reads it."""
    return Item(context, f"\n@{question}", answers[0] + END, tuple(answers))


def entry_item(passage: str, rng: np.random.Generator) -> Item | None:
    """A question for an entry whose label the passage has once; None if there is none."""
    found = [match for match in ENTRY.finditer(passage) if passage.count(match["question"]) == 1]
    if not found:
        return None
    chosen = found[int(rng.integers(len(found)))]
    return item(passage, chosen["question"], [chosen["answer"]])


def fact_item(passage: str, rng: np.random.Generator) -> Item:
    """A question for one of the facts that it hides in the passage, in lines of their own."""
    keys = rng.choice(list(KEYS), HIDDEN, replace=False)
    values = ["".join(value) for value in rng.choice(list(string.ascii_lowercase), (HIDDEN, VALUE_LETTERS))]
    lines = passage.split("\n")
    for key, value in zip(keys, values, strict=True):
        lines.insert(int(rng.integers(len(lines) + 1)), f"@{key}{value}")
    return item("\n".join(lines), str(keys[0]), [values[0]])


def generated(samples: int, held_out: bool, *, characters: int, seed: int, validation: bool = False) -> list[Item]:
    """Questions over passages of documentation, every second one for a hidden fact."""
    rng = np.random.default_rng([seed, held_out])
    files = sources.split(PACKAGES, held_out=held_out, validation=validation)
    asked: list[Item] = []
    for index in rng.permutation(len(files)):
        pieces = [piece for text in sources.documentation(files[index]) for piece in _pieces(text, characters)]
        for number in rng.permutation(len(pieces))[:FROM_A_FILE]:
            make = fact_item if len(asked) % 2 else entry_item
            made = make(pieces[number], rng)
            asked += [] if made is None else [made]
        if len(asked) >= samples:
            break
    return asked[:samples]


def _pieces(text: str, characters: int) -> list[str]:
    """Whole lines of a docstring, at most so many characters together; short ends are left out."""
    pieces, piece = [], ""
    for line in text.split("\n"):
        if len(piece) + len(line) + 1 > characters:
            pieces.append(piece)
            piece = ""
        piece += line[:characters] + "\n"
    return [each.rstrip("\n") for each in [*pieces, piece] if len(each) > characters // 2]


def own(path: Path) -> tuple[list[Item], list[Item]]:
    """The questions of --data."""
    split = loaders.load(path, columns=("context", "question"))
    train, held_out = ([_own_item(row) for row in rows] for rows in (split.train, split.held_out))
    train, held_out = ([each for each in items if each is not None] for items in (train, held_out))
    if not train or not held_out:
        raise TaskError(f"--data {path} needs an answer, or answers, in each row; it has none to train or to evaluate")
    return train, held_out


def _own_item(row: Any) -> Item | None:
    """None for a question without an answer, as SQuAD 2 has them."""
    answers = row.get("answers", row.get("answer")) or []
    if isinstance(answers, dict):  # SQuAD as `datasets` has it
        answers = answers["text"]
    answers = [answers] if isinstance(answers, str) else list(answers)
    return item(row["context"], row["question"], [answer.replace("\n", " ") for answer in answers]) if answers else None


def normalized(answer: str) -> str:
    """As the SQuAD scorer compares: lower case, without punctuation and articles, single spaces."""
    kept = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def f1(answer: str, accepted: str) -> float:
    """The harmonic mean of precision and recall of words. Source: SQuAD, arXiv 1606.05250, section 6.1."""
    given, wanted = normalized(answer).split(), normalized(accepted).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def scores(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> Scores:
    """Exact match and F1, the best over the accepted answers."""
    pairs = list(zip(answers, accepted, strict=True))
    exact = [max(normalized(answer) == normalized(each) for each in right) for answer, right in pairs]
    return {
        "exact match": float(np.mean(exact)),
        "F1": float(np.mean([max(f1(answer, each) for each in right) for answer, right in pairs])),
    }


class Answers:
    """Scores a model by what it writes greedily, up to a line's end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ends = {tokenizer(END, add_special_tokens=False).input_ids[-1], tokenizer.eos_token_id}

    def __call__(self, reader: Reader, examples: Sequence[Example]) -> tuple[Scores, int]:
        answers: list[str] = []
        accepted: list[Sequence[str]] = []
        nbytes = 0
        for batch, read in reader.batches(examples):
            answers += self._write(reader, read)
            accepted += [example.accepted for example in batch]
            nbytes += read.nbytes
        return scores(answers, accepted), nbytes

    def _write(self, reader: Reader, read: Read) -> list[str]:
        token, mask, written = read.last, read.mask, list[torch.Tensor]()
        ended = torch.zeros(len(token), dtype=torch.bool, device=token.device)
        for _ in range(LONGEST_ANSWER):
            token = reader.step(read, token, mask)[:, -1].argmax(-1, keepdim=True)
            written.append(token)
            ended |= torch.isin(token[:, 0], torch.tensor(sorted(self._ends - {None}), device=token.device))
            if ended.all():
                break
            mask = more(mask)
        texts = self._tokenizer.batch_decode(torch.cat(written, dim=1), skip_special_tokens=True)
        return [text.split(END)[0] for text in texts]


def task(asked: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task as its flags ask for it."""
    characters = asked.max_tokens - 64  # room for the facts, the question and the answer
    made = functools.partial(generated, characters=characters, seed=asked.seed, validation=asked.validation)
    train, held_out = split(asked, own, made)
    encode = Encoder(tokenizer, max_tokens=asked.max_tokens)
    return Task(
        name="question answering",
        train=[encode(each) for each in train],
        held_out=[encode(each) for each in held_out],
        baselines=lambda: compared(train, held_out),
        measure=Answers(tokenizer),
    )


def compared(train: Sequence[Item], held_out: Sequence[Item]) -> dict[str, Scores]:
    """What needs no model: the answer that was right before, and the line that is most like the question."""
    accepted = [each.accepted for each in held_out]
    return {
        "answer of the same question in training": scores(baselines.looked_up(train, held_out), accepted),
        "line that shares most words": scores(baselines.best_line(held_out), accepted),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and evaluate."""
    parser = flags.parser(__doc__, train_samples=1200, eval_samples=400, max_tokens=320)
    asked = flags.parse(parser, arguments)
    run(functools.partial(task, asked), asked)


if __name__ == "__main__":
    exit_with(main)
