"""Make text and recall data for a small language model, from text that every machine has.

The text is the Python standard library's source. A recall sample hides lines such as `@Qxy` in it, and ends
by repeating them in another order: whoever still holds the first occurrence can write the values.

    python downstream_tasks/llm/next_tok_pred/generate_data.py --output /tmp/tiny_data

The folder has the stages that train_from_scratch.py goes through, and the text alone, train.txt and validation.txt,
which train_llm.py takes as its --data.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
from tqdm import tqdm

from pikv.evaluation.recall import standard_library

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = "\n" + string.digits + string.ascii_letters + string.punctuation + " "
VOCABULARY = 112  # specials and characters, rounded up to a multiple of 16
_KEYS = string.ascii_uppercase + string.digits  # a sample hides each at most once
QUESTION, VALUE_LETTERS = len("@Q"), 2


@attrs.frozen
class Stage:
    """One step of the curriculum: how long a sample is, how many pairs it hides, how many samples there are."""

    length: int
    pairs: tuple[int, int]  # the fewest and the most pairs of a sample
    samples: int


CURRICULUM = (  # few pairs first: copying any value from the context is then a good guess, and where looking up begins
    Stage(length=64, pairs=(1, 4), samples=60_000),
    Stage(length=96, pairs=(2, 8), samples=40_000),
    Stage(length=192, pairs=(4, 16), samples=16_000),
    Stage(length=384, pairs=(4, 24), samples=8_000),
    Stage(length=768, pairs=(6, 32), samples=4_000),
    Stage(length=1536, pairs=(4, 36), samples=3_000),
    Stage(length=3072, pairs=(4, 36), samples=1_500),
)


def token_ids(text: str) -> np.ndarray:
    """The ids of a text's characters, uint8 [len(text)]; a character outside the vocabulary is <unk>."""
    table = np.full(256, SPECIALS.index("<unk>"), dtype=np.uint8)
    for index, character in enumerate(CHARACTERS):
        table[ord(character)] = len(SPECIALS) + index
    return table[np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8)]


@attrs.frozen
class Sample:
    """A text that ends in questions, and which of its characters answer them."""

    text: str
    answers: tuple[slice, ...]  # where each value stands in the repeated lines

    @property
    def question_start(self) -> int:
        """The index of the first repeated line; what comes before is the context."""
        return self.answers[0].start - QUESTION


def _pairs(rng: np.random.Generator, count: int) -> list[str]:
    keys = rng.choice(list(_KEYS), count, replace=False)
    values = rng.choice(list(string.ascii_lowercase), (count, VALUE_LETTERS))
    return [f"@{key}{''.join(value)}\n" for key, value in zip(keys, values, strict=True)]


def _hidden(passage: str, lines: Sequence[str], rng: np.random.Generator) -> str:
    """The passage with lines somewhere between its own."""
    rows = passage.split("\n")
    places = sorted(rng.integers(0, len(rows) + 1, size=len(lines)).tolist(), reverse=True)
    for place, line in zip(places, lines, strict=True):
        rows.insert(place, line.rstrip("\n"))
    return "\n".join(rows) + "\n"


def recall_sample(text: str, rng: np.random.Generator, *, length: int, pairs: int) -> Sample:
    """Hide `pairs` pairs in a passage of `text` and repeat them at its end.

    `length` counts the context in characters, pairs included; the repeated lines come after it.
    """
    lines = _pairs(rng, pairs)
    passage_length = length - len("".join(lines)) - 1
    if passage_length < 1:
        raise ValueError(f"{pairs} pairs need more than {length} characters; raise length or hide fewer")
    start = int(rng.integers(len(text) - passage_length))
    context = _hidden(text[start : start + passage_length], lines, rng)[-length:]
    context = context.rjust(length, "\n")
    rng.shuffle(lines)
    answers, cursor = [], len(context)
    for line in lines:
        cursor += len(line)
        answers.append(slice(cursor - 1 - VALUE_LETTERS, cursor - 1))
    return Sample(text=context + "".join(lines), answers=tuple(answers))


@attrs.frozen
class Continued:
    """A text to read that hides pairs, what follows it, and the pairs asked for, each a line `@Q` that `xy` ends."""

    read: str
    follows: str
    asked: tuple[tuple[str, str], ...]


def continued(passage: str, rng: np.random.Generator, *, pairs: int) -> Continued:
    """Hide `pairs` pairs in the first half of a passage, and ask for them after its second half, in another order."""
    lines, half = _pairs(rng, pairs), len(passage) // 2
    read = _hidden(passage[:half], lines, rng)
    rng.shuffle(lines)
    asked = tuple(("\n" + line[:QUESTION], line[QUESTION:].rstrip("\n")) for line in lines)
    return Continued(read, passage[half:], asked)


def recall_rows(text: str, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
    """Token ids uint8 [samples, length] and whether a token belongs to an answer, bool of the same shape."""
    line = len(_pairs(rng, 1)[0])
    ids = np.zeros((stage.samples, stage.length), dtype=np.uint8)
    answers = np.zeros(ids.shape, dtype=bool)
    for row in tqdm(range(stage.samples), desc=f"recall, {stage.length} characters", leave=False):
        pairs = int(rng.integers(stage.pairs[0], stage.pairs[1] + 1))
        sample = recall_sample(text, rng, length=stage.length - pairs * line, pairs=pairs)
        ids[row] = token_ids(sample.text)
        for span in sample.answers:
            answers[row, span] = True
    return ids, answers


def text_rows(text: str, rng: np.random.Generator, *, length: int, samples: int) -> np.ndarray:
    """Passages of `text` from random places, uint8 [samples, length]."""
    ids = token_ids(text)
    starts = rng.integers(len(ids) - length, size=samples)
    return np.stack([ids[start : start + length] for start in starts])


def main() -> None:
    """Write one file a stage, curriculum.json, and the text, to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to; made if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="a share of the curriculum's samples; 0.001 to try")
    arguments = parser.parse_args()

    rng = np.random.default_rng(arguments.seed)
    text = standard_library(held_out=False)
    arguments.output.mkdir(parents=True, exist_ok=True)
    names = []
    for number, planned in enumerate(CURRICULUM):
        stage = attrs.evolve(planned, samples=max(2, round(planned.samples * arguments.scale)))
        ids, answers = recall_rows(text, rng, stage)
        names.append(f"stage-{number}-{stage.length}.npz")
        np.savez(arguments.output / names[-1], ids=ids, answers=answers)
    (arguments.output / "curriculum.json").write_text(json.dumps({"seed": arguments.seed, "stages": names}, indent=2))
    for name, passages in (("train", text), ("validation", standard_library(held_out=True))):
        (arguments.output / f"{name}.txt").write_text(passages, encoding="utf-8")
    print(f"{len(names)} stages of text and recall in {arguments.output}")


if __name__ == "__main__":
    main()
