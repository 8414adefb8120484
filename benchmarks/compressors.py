"""What each page format loses and takes: recall of a small model whose every older token is in sealed pages.

As benchmarks/recall.py, whose texts and model these are: hidden `@Qxy` lines, questions that come after the cache was
sealed, held-out texts. Every format answers the same questions, so the loss is the difference to the exact cache
question by question, and its interval a paired bootstrap over texts.

    python benchmarks/compressors.py --output docs/tables/compressors.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from shared import small_model, tables
from shared.small_model import SEED, Mixtral, generate_data
from torch import Tensor
from tqdm import tqdm

import pikv
from pikv.core.ports.transport import Solo

TAIL_TOKENS = 32
RESAMPLES = 10_000
EXACT = "exact"
FORMATS: dict[str, Any] = {
    EXACT: "exact",
    "INT8": "int8",
    "INT4": "int4",
    "INT4, rotated": "int4_rotated",
    "INT2": "int2",
    "INT2, rotated": "int2_rotated",
}


@attrs.frozen
class Result:
    """Of one format: which answers were right, bool [texts, pairs], and the bytes of a text's pages, bases included."""

    right: Tensor
    page_bytes: float
    total_bytes: float


def answer(model: Mixtral, cache: pikv.PiKVCache, batch: list[generate_data.Sample], chunk: int) -> Result:
    """Read the contexts, seal, then ask token by token."""
    ids = small_model.ids_of(batch)
    small_model.read(model, cache, ids[:, : batch[0].question_start], chunk)
    cache.finish_prefill()
    stored = cache.stored_bytes()
    right = small_model.answers(model, cache, ids, batch[0])
    return Result(right, (stored.pages + stored.bases) / len(batch), stored.total / len(batch))


def measure(model: Mixtral, name: str, pairs: int, arguments: argparse.Namespace) -> Result:
    """One format on all texts."""
    shape = small_model.shape_of(model)
    runtime = pikv.runtime_from({"compressor": FORMATS[name], "tail_tokens": TAIL_TOKENS}, shape)
    results = [
        answer(model, pikv.PiKVCache(shape, runtime), batch, arguments.chunk)
        for batch in small_model.batches(arguments.length, pairs, arguments.samples, arguments.batch)
    ]
    right = torch.cat([result.right for result in results])
    return Result(right, results[0].page_bytes, results[0].total_bytes)


def lost(exact: Result, other: Result) -> str:
    """Points lost, and the middle 95 % of what resampled texts lose."""
    points = 100 * (exact.right.double() - other.right.double()).mean(1).numpy()
    chosen = np.random.default_rng(SEED).integers(0, len(points), (RESAMPLES, len(points)))
    low, high = np.percentile(points[chosen].mean(1), [2.5, 97.5])
    return f"{points.mean():.1f} ({low:.1f} to {high:.1f})"


def rows(results: dict[int, dict[str, Result]]) -> Iterator[list[object]]:
    """A row a format: its bytes, then recall and loss for each number of pairs."""
    first = next(iter(results.values()))
    half = first[EXACT].page_bytes / 2, first[EXACT].total_bytes / 2  # as float16 would take them
    for name, result in first.items():
        row: list[object] = [name, f"{result.page_bytes / half[0]:.3f}", f"{result.total_bytes / half[1]:.3f}"]
        for of_pairs in results.values():
            row += [f"{100 * float(of_pairs[name].right.double().mean()):.1f}", lost(of_pairs[EXACT], of_pairs[name])]
        yield row


def main() -> None:
    """Measure every format and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=small_model.MODEL)
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    parser.add_argument("--length", type=int, default=2048, help="characters of the text")
    parser.add_argument("--pairs", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the prompt at a time")
    parser.add_argument("--only", nargs="*", default=list(FORMATS), choices=list(FORMATS), metavar="NAME")
    arguments = parser.parse_args()
    model = Mixtral(arguments.model, Solo())
    names = [EXACT, *(name for name in arguments.only if name != EXACT)]
    results = {
        pairs: {name: measure(model, name, pairs, arguments) for name in tqdm(names, desc=f"{pairs} pairs")}
        for pairs in arguments.pairs
    }
    columns = ["format", "pages", "with the tail"]
    for pairs in arguments.pairs:
        columns += [f"{pairs} pairs: recalled, %", "lost, points (95 %)"]
    text = (
        f"Pairs hidden in {arguments.length} characters, {arguments.samples} texts for each number of pairs (seed "
        f"{SEED}); the prompt in chunks of {arguments.chunk}, pages of 64 tokens, a tail of {TAIL_TOKENS} exact tokens "
        "and more until a page is full. Bytes are those stored when the questions begin, as shares of what float16 "
        "would take (half of the exact cache's, which is in float32): of pages, bases included, and of everything. "
        "Lost: against the exact cache, question by question; a paired bootstrap over texts.\n\n"
        f"{tables.command()}\n\n"
    )
    tables.save(text + tables.markdown(columns, rows(results)), arguments.output)


if __name__ == "__main__":
    main()
