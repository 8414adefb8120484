r"""Train a causal model to write text that goes on, and see how well it does from a cache.

    python downstream_tasks/llm/next_tok_pred/train_llm.py --output /tmp/next_token
    python downstream_tasks/llm/next_tok_pred/train_llm.py --output /tmp/lora --use_lora --learning_rate 1e-2
    python downstream_tasks/llm/next_tok_pred/train_llm.py --data book.txt --model YOUR_MODEL --output /tmp/book

Without --data the text is the source of installed packages, of which files are held out. Your own is plain text or has
the column text. It is cut into samples that do not overlap. In the first half of each, lines such as `@Qxy` are hidden,
and their values are asked for at its end. The model is trained on all of it. It is evaluated by reading the first half
into a cache, which is cut and sealed then: by the perplexity of the text that follows, a few tokens at a time, and by
the hidden values that it would write.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import final

import attrs
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[3]))  # scripts are run by their path

from downstream_tasks.llm.next_tok_pred import generate_data
from downstream_tasks.shared import baselines, flags, loaders, models, results, sources
from downstream_tasks.shared.caches import Read, Reader
from downstream_tasks.shared.errors import TaskError, exit_with
from downstream_tasks.shared.examples import IGNORED, Example
from downstream_tasks.shared.results import Scores
from downstream_tasks.shared.run import Task, run

PACKAGES = ("networkx", "numpy", "scipy")
CHUNK = 8  # tokens that follow, at a time: fewer than a page, so that they are decoded and not a second prompt
ORDER = 6  # of the n-grams that a model is compared with


@final
@attrs.frozen(kw_only=True)
class Continuation(Example):
    """A prompt, and as its answer what follows it: so many tokens of text, and then questions for hidden values.

    values: where in the answer these stand.
    """

    text: int
    values: tuple[slice, ...] = ()


def installed(*, held_out: bool, validation: bool) -> str:
    """The sources of PACKAGES, one after another."""
    return "\n".join(each.text for each in sources.split(PACKAGES, held_out=held_out, validation=validation))


def own(path: Path) -> tuple[str, str]:
    """The texts of --data, one after another."""
    split = loaders.load(path, columns=("text",))
    train, held_out = ("\n\n".join(str(row["text"]) for row in rows) for rows in (split.train, split.held_out))
    return train, held_out


class Samples:
    """Cuts a text into samples of at most max_tokens, in which pairs are hidden."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, pairs: int) -> None:
        self._tokenizer, self._max_tokens, self._pairs = tokenizer, max_tokens, pairs

    def of(self, text: str, *, samples: int, seed: Sequence[int]) -> list[Continuation]:
        """So many samples at most, from anywhere in a text. Raises TaskError if it has none."""
        characters = self._characters(text)
        starts = np.arange(0, len(text) - characters + 1, characters)
        if not len(starts):
            raise TaskError(
                f"a text of {len(text)} characters is too short for one sample of {characters}; lower --max_tokens, or "
                "give more text, to train on and to hold out"
            )
        rng = np.random.default_rng(seed)
        passages = (text[start : start + characters] for start in rng.permutation(starts)[:samples].tolist())
        return [self._encoded(generate_data.continued(each, rng, pairs=self._pairs)) for each in passages]

    def _characters(self, text: str) -> int:
        """The length of a passage that with its pairs, twice, has about max_tokens."""
        seen = text[: 16 * self._max_tokens]
        hidden = 2 * self._pairs * len("\n@Qxy")
        characters = self._max_tokens * len(seen) // max(1, len(self._ids(seen))) - hidden
        if characters < hidden:
            raise TaskError(
                f"--max_tokens {self._max_tokens} has no room for --pairs {self._pairs} twice and as much text; raise "
                "one or lower the other"
            )
        return characters

    def _encoded(self, made: generate_data.Continued) -> Continuation:
        start: list[int] = self._tokenizer("").input_ids  # what the tokenizer puts before every text, mostly nothing
        prompt, asked, values = [*start, *self._ids(made.read)], list[int](), list[slice]()
        for question, value in made.asked:
            asked += self._ids(question)
            values.append(slice(len(asked), len(asked) + len(self._ids(value))))
            asked += self._ids(value)
        follows = self._ids(made.follows)[: max(0, self._max_tokens - len(prompt) - len(asked))]
        moved = tuple(slice(len(follows) + span.start, len(follows) + span.stop) for span in values)
        return Continuation(prompt=prompt, answer=follows + asked, text=len(follows), values=moved)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


def whole(example: Continuation) -> Example:
    """To train on: all of it is to be written."""
    return Example(prompt=[], answer=example.prompt + example.answer)


def measure(reader: Reader, examples: Sequence[Continuation]) -> tuple[Scores, int]:
    """The perplexity of the text that follows the prompts, and the share of hidden values that greedy decoding writes.

    Everything that follows is given to the model as it should be; a value counts when its every token is the most
    likely one, which is when greedy decoding would have written it.
    """
    cost = tokens = right = asked = nbytes = 0
    for batch, read in reader.batches(examples):
        spent, likely = _told(reader, read, [example.answer for example in batch])
        for row, example in enumerate(batch):
            cost, tokens = cost + float(spent[row, : example.text].sum()), tokens + example.text
            right += sum(bool(likely[row, span].all()) for span in example.values)
            asked += len(example.values)
        nbytes += read.nbytes
    recall = {"recall": right / asked} if asked else {}
    return {"perplexity": math.exp(cost / max(1, tokens)), **recall}, nbytes


def _told(reader: Reader, read: Read, answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """What each token of the answers cost, -log p, and whether it was the most likely one: [batch, longest answer]."""
    longest = max(map(len, answers))
    wanted = torch.full((len(answers), longest), IGNORED, device=read.last.device)
    for row, answer in enumerate(answers):
        wanted[row, : len(answer)] = torch.tensor(answer)
    given = torch.cat([read.last, wanted[:, :-1]], dim=1)
    mask = torch.cat([read.mask[:, :-1], (given != IGNORED).to(read.mask.dtype)], dim=1)
    seen = read.mask.shape[1] - 1
    shown = given.masked_fill(given == IGNORED, 0)  # any token will do where the mask says that there is none
    logits = torch.cat(
        [
            reader.step(read, shown[:, first : first + CHUNK], mask[:, : seen + first + CHUNK])
            for first in range(0, longest, CHUNK)
        ],
        dim=1,
    )
    costs = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    return costs, logits.argmax(-1) == wanted


def task(asked: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task as its flags ask for it."""
    if asked.data:
        texts = own(asked.data)
    else:
        texts = (
            installed(held_out=False, validation=asked.validation),
            installed(held_out=True, validation=asked.validation),
        )
    cut = Samples(tokenizer, max_tokens=asked.max_tokens, pairs=asked.pairs)
    train, held_out = (
        cut.of(text, samples=samples, seed=[asked.seed, number])
        for number, (text, samples) in enumerate(zip(texts, (asked.train_samples, asked.eval_samples), strict=True))
    )
    return Task(
        name="next token",
        train=[whole(each) for each in train],
        held_out=held_out,
        baselines=lambda: compared(asked, train, held_out),
        measure=measure,
    )


def compared(
    asked: argparse.Namespace, train: Sequence[Continuation], held_out: Sequence[Continuation]
) -> dict[str, Scores]:
    """The model before training, and n-grams of the tokens that it was trained on."""
    grams = baselines.Grams([example.prompt + example.answer for example in train], order=ORDER)
    perplexity = grams.perplexity((example.prompt, example.answer[: example.text]) for example in held_out)
    scores = {f"{ORDER}-grams of the tokens trained on": {"perplexity": perplexity}}
    if asked.eval_only:
        return scores
    before, tokenizer = models.load(asked)
    rows = results.with_each_cache(before.to(asked.device), held_out, [], measure, pad=tokenizer.pad_token_id)
    return {"model, before training": rows[0].scores, **scores}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and evaluate."""
    parser = flags.parser(__doc__, train_samples=640, eval_samples=160, max_tokens=512)
    parser.add_argument("--pairs", type=int, choices=range(37), default=4, metavar="0..36", help="hidden in a sample")
    asked = flags.parse(parser, arguments)
    run(functools.partial(task, asked), asked)


if __name__ == "__main__":
    exit_with(main)
