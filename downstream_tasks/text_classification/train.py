r"""Train a causal model to say which class a text is of, and see what a cache does to its answers.

    python downstream_tasks/text_classification/train.py --output /tmp/classification
    python downstream_tasks/text_classification/train.py --output /tmp/lora --use_lora --learning_rate 1e-2
    torchrun --standalone --nproc_per_node=2 downstream_tasks/text_classification/train.py \
        --model_type distributed --output /tmp/two

Each class has a letter, and the model answers a text with the most likely of these letters. Without --data the texts
are passages of installed packages, and their classes the packages; files, not passages, are held out. Your own data
needs the columns text and label.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import string
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[2]))  # scripts are run by their path

from downstream_tasks.shared import baselines, flags, loaders, sources
from downstream_tasks.shared.caches import Reader
from downstream_tasks.shared.errors import TaskError, exit_with
from downstream_tasks.shared.examples import Encoder, Example, Item
from downstream_tasks.shared.results import Scores
from downstream_tasks.shared.run import Task, run, split

PACKAGES = ("accelerate", "networkx", "numpy", "peft", "sympy", "tokenizers", "torch", "transformers")
LETTERS = string.ascii_uppercase + string.ascii_lowercase
CUE = "\n?"


def passages(
    samples: int, held_out: bool, *, characters: int, seed: int, validation: bool = False
) -> list[tuple[str, str]]:
    """Texts and their packages, about the same number of each; they begin at the beginning of a line."""
    rng = np.random.default_rng([seed, held_out])
    found: list[tuple[str, str]] = []
    for package in PACKAGES:
        texts = [each.text for each in sources.split([package], held_out=held_out, validation=validation)]
        if not texts:
            raise TaskError(f"{package} has no file that is {'held out' if held_out else 'for training'}")
        whole = "\n".join(texts)
        for _ in range(-(-samples // len(PACKAGES))):
            start = int(rng.integers(max(1, len(whole) - characters)))
            line = whole.rfind("\n", 0, start) + 1
            found.append((whole[line : line + characters], package))
    return [found[index] for index in rng.permutation(len(found))[:samples]]


def own(path: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Texts and labels of --data."""
    split = loaders.load(path, columns=("text", "label"))
    train, held_out = (
        [(str(row["text"]), str(row["label"])) for row in rows] for rows in (split.train, split.held_out)
    )
    unknown = {label for _, label in held_out} - {label for _, label in train}
    if unknown:
        raise TaskError(f"--data {path}: {', '.join(sorted(unknown))} is held out and never trained on; mend the split")
    return train, held_out


def as_items(texts: Sequence[tuple[str, str]], letters: dict[str, str]) -> list[Item]:
    return [Item(text, CUE, letters[label], (letters[label],)) for text, label in texts]


class Answers:
    """Scores a model by the letters that it gives."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, letters: Sequence[str]) -> None:
        ids = [tokenizer(letter, add_special_tokens=False).input_ids for letter in letters]
        if any(len(each) != 1 for each in ids) or len({each[0] for each in ids}) < len(letters):
            raise TaskError(f"the tokenizer must have a token for each of {''.join(letters)}; use another --model")
        self._letters, self._ids = list(letters), torch.tensor([each[0] for each in ids])

    def __call__(self, reader: Reader, examples: Sequence[Example]) -> tuple[Scores, int]:
        right = nbytes = 0
        for batch, read in reader.batches(examples):
            logits = reader.step(read, read.last, read.mask)[:, -1]
            best = logits[:, self._ids.to(logits.device)].argmax(-1).tolist()
            right += sum(self._letters[index] in each.accepted for index, each in zip(best, batch, strict=True))
            nbytes += read.nbytes
        return {"accuracy": right / len(examples)}, nbytes


def task(asked: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task as its flags ask for it."""
    characters = 4 * asked.max_tokens  # a token is seldom more
    made = functools.partial(passages, characters=characters, seed=asked.seed, validation=asked.validation)
    train, held_out = split(asked, own, made)
    labels = sorted({label for _, label in train})
    if not 2 <= len(labels) <= len(LETTERS):
        raise TaskError(
            f"labels must be 2 to {len(LETTERS)} different ones, got {len(labels)}: {', '.join(labels[:9])}"
        )
    letters = dict(zip(labels, LETTERS, strict=False))
    encode = Encoder(tokenizer, max_tokens=asked.max_tokens)
    items = [[encode.cut(item) for item in as_items(texts, letters)] for texts in (train, held_out)]
    return Task(
        name="text classification",
        train=[encode(item) for item in items[0]],
        held_out=[encode(item) for item in items[1]],
        baselines=lambda: compared(*items),
        measure=Answers(tokenizer, list(letters.values())),
    )


def compared(train: Sequence[Item], held_out: Sequence[Item]) -> dict[str, Scores]:
    """The accuracy of the most common class, and of a bag of words."""
    majority = itertools.repeat(baselines.most_common([item.answer for item in train]), len(held_out))
    answers = {"majority class": majority, "bag of words, logistic regression": baselines.bag_of_words(train, held_out)}
    return {
        name: {"accuracy": float(np.mean([given == item.answer for given, item in zip(each, held_out, strict=True)]))}
        for name, each in answers.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and evaluate."""
    parser = flags.parser(__doc__, train_samples=1600, eval_samples=400, max_tokens=256)
    asked = flags.parse(parser, arguments)
    run(functools.partial(task, asked), asked)


if __name__ == "__main__":
    exit_with(main)
