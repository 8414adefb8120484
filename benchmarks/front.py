"""Quality against stored bytes: every token selector with every allocator and page format, cut to the same bytes.

The model of downstream_tasks/models/tiny_moe reads a text in chunks, its cache is cut to a share of the float16 dense
cache's bytes, and only then comes what is asked: `@Qxy` lines that were hidden in the text, a line at a time, or how
the text goes on. A value counts if its every character is the most likely one. Heads are calibrated on the training
split, compositions were chosen on one seed, and tables are made with another. Bytes are counted from the storages when
the questions begin, tail, tables and kept queries included.

    python benchmarks/front.py --csv docs/tables/front.csv --output docs/tables/front.md --figure docs/figures/front.svg

A row that the CSV has is not measured again. Plans of the byte solver, made by benchmarks/solver.py, are rows too.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import itertools
import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from shared import figures, small_model, tables
from shared.small_model import Half, Mixtral, generate_data
from torch import Tensor
from tqdm import tqdm

import pikv
from pikv.core.ports.transport import Solo
from pikv.policies import DuoAttention

LINE = len("@Qxy\n")
TEXT_TOKENS = 160  # how far a text goes on
SELECTORS: dict[str, dict[str, Any]] = {
    "recent": {"name": "recent"},
    "importance": {"name": "importance", "window": 16, "recent": 16},
    "snapkv": {"name": "snapkv", "window": 16},
    "tova": {"name": "tova"},
    "keydiff": {"name": "keydiff", "recent": 8},
    "key norm": {"name": "key_norm", "recent": 8},
    "lagkv": {"name": "lagkv", "recent": 8},
}
ALLOCATORS: dict[str, Any] = {
    "uniform": "uniform",
    "pyramid": "pyramid",
    "adakv": "adakv",
    "adakv by attention": {"name": "adakv", "scored_by": SELECTORS["importance"]},
    "duo 1": 1,
    "duo 2": 2,
}
COMPRESSORS = {"exact": "exact", "INT4": "int4", "INT2": "int2"}
PAGES = {"page_size": 16, "tail_tokens": 16}


@attrs.frozen
class Row:
    """One composition at one share of the bytes. recall: percent; half: of the 95 % interval of what is lost."""

    composition: str
    share: float
    seed: int
    budget_tokens: int
    stored: float
    recall_8: float
    half_8: float
    recall_32: float
    half_32: float
    text: float
    half_text: float


@attrs.frozen
class Task:
    """Token ids [samples, tokens], where what is asked begins, and where the answers stand; none for a text."""

    ids: Tensor
    start: int
    answers: tuple[slice, ...]

    @classmethod
    def recall(cls, arguments: argparse.Namespace, pairs: int) -> Task:
        """Pairs hidden in held-out text."""
        text, rng = generate_data.standard_library(held_out=True), np.random.default_rng(arguments.seed)
        questions = arguments.questions // pairs
        samples = [
            generate_data.recall_sample(text, rng, length=arguments.length, pairs=pairs) for _ in range(questions)
        ]
        return cls(small_model.ids_of(samples), samples[0].question_start, samples[0].answers)

    @classmethod
    def text(cls, arguments: argparse.Namespace) -> Task:
        """Held-out text as it is."""
        text, rng = generate_data.standard_library(held_out=True), np.random.default_rng(arguments.seed)
        length = arguments.length + TEXT_TOKENS
        rows = generate_data.text_rows(text, rng, length=length, samples=max(1, arguments.questions // 32))
        return cls(torch.from_numpy(rows).long(), arguments.length, ())

    def score(self, logits: Tensor, rows: slice) -> Tensor:
        """Of each sample [n]: the percent recalled, or the loss in nats a character. logits: from start on, but one."""
        ids = self.ids[rows, self.start + 1 :]
        if not self.answers:
            return torch.nn.functional.cross_entropy(logits.mT, ids, reduction="none").mean(1)
        right = logits.argmax(-1) == ids
        spans = [slice(span.start - self.start - 1, span.stop - self.start - 1) for span in self.answers]
        return 100 * torch.stack([right[:, span].all(1) for span in spans]).double().mean(0)


@attrs.frozen
class Bench:
    """The model, the shape of its cache, the command line, and budgets that have been found."""

    model: Mixtral
    shape: pikv.ModelConfig
    arguments: argparse.Namespace
    budgets: dict[tuple[Any, ...], int | None] = attrs.field(factory=dict, init=False)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Bench:
        """Read the model."""
        model = Mixtral(arguments.model, Solo())
        return cls(model, small_model.shape_of(model, torch.float16), arguments)

    @property
    def full_bytes(self) -> int:
        """Of one sequence's float16 dense cache: keys and values alone."""
        return sum(2 * 2 * layer.kv_heads * layer.key_dim for layer in self.shape.layers) * self.arguments.length

    def cache(self, names: dict[str, Any]) -> pikv.PiKVCache:
        """A cache composed by names; an allocator may be an object."""
        allocator = names.get("allocator")
        named = {key: value for key, value in names.items() if not isinstance(value, DuoAttention)}
        runtime = pikv.runtime_from(named, self.shape)
        return pikv.PiKVCache(
            self.shape, attrs.evolve(runtime, allocator=allocator) if isinstance(allocator, DuoAttention) else runtime
        )

    def read(self, cache: pikv.PiKVCache, ids: Tensor) -> None:
        """A prompt, in chunks."""
        small_model.read(self.model, Half(cache), ids, self.arguments.chunk)
        cache.finish_prefill()

    def calibrated(self, heads: int) -> DuoAttention:
        """Retrieval heads by how far they attend in texts of the training split."""
        text, rng = generate_data.standard_library(held_out=False), np.random.default_rng(0)
        rows = generate_data.text_rows(text, rng, length=self.arguments.length, samples=4)
        window = {"name": "importance", "window": 256}
        cache = self.cache({"token_selector": window, "budget_tokens": 2 * self.arguments.length})
        self.read(cache, torch.from_numpy(rows).long())
        return DuoAttention.calibrated([cache.view(i) for i in range(len(self.shape.layers))], heads=heads)

    def budget_for(self, names: dict[str, Any], share: float) -> int | None:
        """The most tokens, in whole pages, whose bytes are within the share; None if the least are not.

        Bytes depend on the page format, on the queries that are kept and, by the tables, on who has the pages.
        """
        window = self.cache({**names, "budget_tokens": self.arguments.length}).runtime.query_window
        key = (names["compressor"], str(names["allocator"]), window, share)
        if key not in self.budgets:
            self.budgets[key] = self._searched(names, window, share)
        return self.budgets[key]

    def _searched(self, names: dict[str, Any], window: int | None, share: float) -> int | None:
        size, tail = PAGES["page_size"], PAGES["tail_tokens"]
        looks = {"name": "recent"} if window is None else {"name": "importance", "window": window, "recent": 0}
        fewest, most, fits = 1, self.arguments.length // size, None
        while fewest <= most:
            pages = (fewest + most) // 2
            cache = self.cache({**names, "token_selector": looks, "budget_tokens": tail + pages * size})
            self.read(cache, torch.full((1, self.arguments.length), 7))
            if cache.stored_bytes().total <= share * self.full_bytes:
                fits, fewest = tail + pages * size, pages + 1
            else:
                most = pages - 1
        return fits

    def scores(self, names: dict[str, Any], task: Task) -> tuple[Tensor, float]:
        """Of each sample, and the bytes of one when its questions begin."""
        scores, stored = [], []
        for first in range(0, len(task.ids), self.arguments.batch):
            rows = slice(first, first + self.arguments.batch)
            ids, cache = task.ids[rows], self.cache(names)
            self.read(cache, ids[:, : task.start])
            stored.append(cache.stored_bytes().total / len(ids))
            asked = range(task.start, ids.shape[1] - 1, LINE)
            ends = [min(place + LINE, ids.shape[1] - 1) for place in asked]
            logits = [self.model.predict(ids[:, a:b], a, Half(cache)) for a, b in zip(asked, ends, strict=True)]
            scores.append(task.score(torch.cat(logits, dim=1), rows))
        return torch.cat(scores), float(np.mean(stored))


def half_width(lost: Tensor) -> float:
    """Half of the 95 % interval of the mean of what samples [n] lose against the full cache, by bootstrap."""
    drawn = torch.randint(len(lost), (2000, len(lost)), generator=torch.Generator().manual_seed(0))
    low, high = lost.double()[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return (high - low) / 2


def compositions(bench: Bench) -> dict[str, dict[str, Any]]:
    """All by name: token selector, allocator, page format."""
    allocators = {name: bench.calibrated(a) if isinstance(a, int) else a for name, a in ALLOCATORS.items()}
    return {
        f"{selector}, {allocator}, {compressor}": {
            **PAGES,
            "token_selector": SELECTORS[selector],
            "allocator": allocators[allocator],
            "compressor": COMPRESSORS[compressor],
        }
        for selector, allocator, compressor in itertools.product(SELECTORS, ALLOCATORS, COMPRESSORS)
    }


def measure(bench: Bench, name: str, share: float, names: dict[str, Any], tasks: list[Task], full: list[Tensor]) -> Row:
    """One row."""
    results = [bench.scores(names, task) for task in tasks]
    numbers: list[float] = []
    for (scores, _), best in zip(results, full, strict=True):
        numbers += [float(scores.mean()), half_width(best - scores)]
    stored = max(nbytes for _, nbytes in results) / bench.full_bytes
    return Row(name, share, bench.arguments.seed, names.get("budget_tokens", bench.arguments.length), stored, *numbers)


def table(rows: list[Row], arguments: argparse.Namespace) -> str:
    """Markdown: what was measured, a line a row, the best of a share first."""
    ordered = sorted(rows, key=lambda row: (-row.share, -(row.recall_8 + row.recall_32)))
    lines = [
        [
            row.composition,
            row.share if row.share < 1 else "",
            row.budget_tokens,
            f"{row.stored:.3f}",
            f"{row.recall_8:.1f} ± {row.half_8:.1f}",
            f"{row.recall_32:.1f} ± {row.half_32:.1f}",
            f"{row.text:.3f} ± {row.half_text:.3f}",
        ]
        for row in ordered
    ]
    columns = ["composition", "asked for", "tokens", "stored", "8 pairs, %", "32 pairs, %", "text, nats"]
    said = (
        f"{arguments.length} characters of context, read in chunks of {arguments.chunk}, question unknown when the "
        f"cache is cut; {arguments.questions} questions for each number of pairs (seed {arguments.seed}), float16 "
        f"cache, pages of {PAGES['page_size']}, tails of {PAGES['tail_tokens']}. Stored: a share of the float16 dense "
        "cache's keys and values, all else that a cache holds included. Text: the loss of what follows an ordinary "
        "text. ±: half of the 95 % interval of what is lost against the full cache, a paired bootstrap over samples."
    )
    return "\n".join([said, "", tables.command(), "", tables.markdown(columns, lines)])


def saved(path: Path | None) -> list[Row]:
    """The rows of a CSV, if there is one."""
    if path is None or not path.exists():
        return []
    with path.open(newline="") as file:
        return [Row(**{name: _typed(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]


def _typed(name: str, text: str) -> Any:
    return text if name == "composition" else int(text) if name in ("seed", "budget_tokens") else float(text)


def planned(bench: Bench) -> list[tuple[str, float, dict[str, Any]]]:
    """What the byte solver has composed, by name and share."""
    if bench.arguments.plans is None:
        return []
    plans = json.loads(bench.arguments.plans.read_text())["plans"]
    return [("keydiff, byte solver", float(share), names) for share, names in plans.items()]


def wanted(bench: Bench, done: list[Row]) -> list[tuple[str, float, dict[str, Any]]]:
    """Names, shares and parts of what is still to be measured."""
    known = {(row.composition, row.share, row.seed) for row in done}
    whole = {f"everything, {name}": {**PAGES, "compressor": compressor} for name, compressor in COMPRESSORS.items()}
    asked = [(name, 1.0, names) for name, names in whole.items()]
    composed = itertools.product(bench.arguments.shares, compositions(bench).items())
    for name, share, names in [*((name, share, names) for share, (name, names) in composed), *planned(bench)]:
        if share in bench.arguments.shares and any(fnmatch.fnmatch(name, each) for each in bench.arguments.only):
            asked.append((name, share, names))
    return [each for each in asked if (each[0], each[1], bench.arguments.seed) not in known]


def main() -> None:
    """Measure what is missing, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=small_model.MODEL)
    parser.add_argument("--csv", type=Path, help="rows that are done, kept after each")
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--length", type=int, default=2048, help="characters of the text")
    parser.add_argument("--questions", type=int, default=2048, help="for each number of pairs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the prompt at a time")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.05])
    parser.add_argument("--plans", type=Path, help="of the byte solver: a file made by benchmarks/solver.py")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="compositions, as file names")
    arguments = parser.parse_args()

    bench = Bench.of(arguments)
    tasks = [Task.recall(arguments, 8), Task.recall(arguments, 32), Task.text(arguments)]
    rows = saved(arguments.csv)
    missing = wanted(bench, rows)
    full = [bench.scores(PAGES, task)[0] for task in tqdm(tasks, desc="the full cache")] if missing else []
    for name, share, names in tqdm(missing, desc="compositions"):
        solved = names.get("budget_tokens")
        budget = solved or (bench.budget_for(names, share) if share < 1 else None)
        if share < 1 and budget is None:
            tqdm.write(f"{name}: its least budget takes more than {share} of the bytes")
            continue
        rows.append(
            measure(bench, name, share, {**names, **({"budget_tokens": budget} if budget else {})}, tasks, full)
        )
        tables.save_csv(rows, arguments.csv)
    tables.save(table(rows, arguments), arguments.output)
    if arguments.figure:
        points = {p: [(r.stored, getattr(r, f"recall_{p}"), r.composition) for r in rows] for p in (8, 32)}
        figures.against_bytes({f"{p} pairs": each for p, each in points.items()}, "recalled, %", arguments.figure)


if __name__ == "__main__":
    main()
