"""Many questions to one document: time to the first token and stored bytes, by the number of threads.

    python benchmarks/prefix_sharing.py --output docs/tables/prefix_sharing.md

Each number of threads has a process of its own, one after another. The program is examples/prefix_sharing.py, with a
model of random weights.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from pathlib import Path

import torch
from shared import tables

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from prefix_sharing import Measured, measure

COLUMNS = (
    "threads",
    "alone, s",
    "first question, s",
    "later ones, s",
    "the slowest of them, s",
    "alone / later",
    "stored, MB",
    "of that tails, MB",
    "one cache alone, MB",
)


def measured(threads: int, document_tokens: int, questions: int, alone: int) -> Measured:
    """In this process."""
    torch.set_num_threads(threads)
    return measure(document_tokens, questions, alone)


def row(threads: int, found: Measured) -> tuple[str, ...]:
    """As it is shown."""
    whole = statistics.median(found.alone_s)
    seconds = (whole, found.sharing_s[0], found.later_s, max(found.sharing_s[1:]))
    nbytes = (found.sharing_bytes, found.tail_bytes, found.alone_bytes)
    return (
        str(threads),
        *(f"{each:.3f}" for each in seconds),
        f"{whole / found.later_s:.0f}",
        *(f"{each / 1e6:.1f}" for each in nbytes),
    )


def main() -> None:
    """Measure, and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document-tokens", type=int, default=8192)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--alone", type=int, default=5, help="how many of the questions are asked alone too")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    size, context = (
        (arguments.document_tokens, arguments.questions, arguments.alone),
        multiprocessing.get_context("spawn"),
    )
    rows = []
    for threads in arguments.threads:
        with context.Pool(1) as process:
            rows.append(row(threads, process.apply(measured, (threads, *size))))
    lines = (
        f"{arguments.questions} questions of 16 tokens to a document of {arguments.document_tokens}, exact pages of 64 "
        f"tokens, a Llama of 4 layers and 256 channels. {tables.machine()}. Medians; the logits are those of a cache "
        "alone to 1e-4. Kernels were compiled before.",
        tables.command(),
        tables.markdown(COLUMNS, rows).rstrip(),
    )
    tables.save("\n\n".join(lines) + "\n", arguments.output)


if __name__ == "__main__":
    main()
