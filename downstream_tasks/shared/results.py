"""What a model scores with each cache: measured, as a table, as a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from tqdm import tqdm

from downstream_tasks.shared import models
from downstream_tasks.shared.caches import Reader, compositions, names_for
from downstream_tasks.shared.examples import Example
from pikv.adapters.transformers import attach, model_config
from pikv.core.torch_backend import TorchBackend

Scores = dict[str, float]
Measure = Callable[[Reader, Sequence[Example]], tuple[Scores, int]]
"""Scores of examples by name, and the bytes that their caches held together."""


@attrs.frozen
class Row:
    """A composition, its scores, and the bytes of a prompt's cache when the answer begins."""

    composition: str
    scores: Scores
    bytes_a_prompt: int
    share: float  # of the full cache's bytes


def with_each_cache(
    model: Any, examples: Sequence[Example], asked: Sequence[str] | None, measure: Measure, *, pad: int
) -> list[Row]:
    """Measure with the full cache and with each composition; a share is of the mean prompt's tokens.

    With the torch backend: compiling kernels would take longer than prompts of some hundred tokens do.
    """
    tokens = round(sum(len(example.prompt) for example in examples) / len(examples))
    shape, rows = model_config(model), list[Row]()
    named = [(each.text, names_for(each, shape, tokens=tokens)) for each in compositions(asked)]
    for text, names in tqdm(named, desc="caches", unit="composition"):
        with models.evaluating(model), attach(model, names, backends=[TorchBackend()]) as host:
            scores, nbytes = measure(Reader(model, host, pad=pad), examples)
        held = nbytes // len(examples)
        rows.append(Row(text, scores, held, held / (rows[0].bytes_a_prompt if rows else held)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, a line a composition."""
    names = list(rows[0].scores)
    lines: list[Sequence[str]] = [["cache", *names, "bytes a prompt", "of the full cache"], ["---"] * (len(names) + 3)]
    lines += [
        [
            f"`{row.composition}`",
            *(f"{row.scores[name]:.3f}" for name in names),
            f"{row.bytes_a_prompt}",
            f"{row.share:.3f}",
        ]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def beside(scores: Mapping[str, Scores]) -> str:
    """A Markdown table of a model and what it is compared with, each with the same scores."""
    names = list(dict.fromkeys(name for each in scores.values() for name in each))
    lines: list[Sequence[str]] = [["held-out data", *names], ["---"] * (len(names) + 1)]
    lines += [[who, *(f"{each[name]:.3f}" if name in each else "" for name in names)] for who, each in scores.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(rows: Sequence[Row], output: Path) -> None:
    """Scores against bytes, a panel a score."""
    from matplotlib.figure import Figure  # here: it takes a second

    names = list(rows[0].scores)
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, name in zip(_flat(figure.subplots(1, len(names))), names, strict=True):
        for row in rows:
            axes.plot(row.share, row.scores[name], "o")
            axes.annotate(row.composition, (row.share, row.scores[name]), fontsize="x-small", rotation=20)
        axes.set(xlabel="stored bytes, of the full cache", ylabel=name, xscale="log")
        axes.grid(alpha=0.3)
    figure.savefig(output, metadata={"Date": None})


def _flat(axes: Any) -> Iterator[Any]:
    yield from getattr(axes, "flat", [axes])


def save(
    folder: Path,
    *,
    title: str,
    command: str,
    compared: Mapping[str, Scores],
    rows: Sequence[Row],
    more: Mapping[str, Any],
) -> None:
    """Print the tables, and write results.md, results.json and results.svg into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"# {title}\n\n    {command}\n\n{beside(compared)}\n{table(rows)}"
    print(text)
    (folder / "results.md").write_text(text)
    values = {**more, "command": command, "compared": compared, "caches": [attrs.asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(values, indent=2) + "\n")
    plot(rows, folder / "results.svg")
