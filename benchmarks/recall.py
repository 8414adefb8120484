"""How much a small model still recalls when its cache is cut, stored in fewer bits, or read in part.

The model of downstream_tasks/models/tiny_moe reads a text in which `@Qxy` lines are hidden, the cache is
evicted and sealed, and only then come the questions, token by token: what was needed is not known when the cache is
cut. A value counts if its every character is the most likely one. Texts are held out from training, and no part of
PiKV was tuned on them.

    python benchmarks/recall.py --output docs/tables/recall.md
"""

from __future__ import annotations

import argparse
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
from pikv.core.ports import AttendKernel, Backend, ChooseKernel, PageCodec, Pages, PageSelector, SealKernel
from pikv.core.ports.transport import Solo
from pikv.core.torch_backend import TorchBackend

SELECTED = {"tail_tokens": 32, "page_size": 16, "allocator": "uniform"}
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "INT8": {"compressor": "int8", "tail_tokens": 32},
    "INT4": {"compressor": "int4", "tail_tokens": 32},
    "INT2": {"compressor": "int2", "tail_tokens": 32},
    "recent, half": {**SELECTED, "token_selector": "recent", "budget_tokens": 1024},
    "recent, quarter": {**SELECTED, "token_selector": "recent", "budget_tokens": 512},
    "importance, half": {**SELECTED, "token_selector": "importance", "budget_tokens": 1024},
    "importance, quarter": {**SELECTED, "token_selector": "importance", "budget_tokens": 512},
    "importance, quarter, pyramid": {
        **SELECTED,
        "token_selector": "importance",
        "budget_tokens": 512,
        "allocator": "pyramid",
    },
    "importance, half, INT4": {
        **SELECTED,
        "token_selector": "importance",
        "budget_tokens": 1024,
        "compressor": "int4",
    },
}
for _pages in (4, 8, 16, 32):
    COMPOSITIONS[f"quest, {_pages} of 128 pages"] = {
        "page_selector": {"name": "quest", "pages": _pages, "dense_layers": 0},
        "page_size": 16,
        "tail_tokens": 32,
    }


@attrs.define
class Reads:
    """What attention read of the sealed pages while questions were answered."""

    nbytes: int = 0


@attrs.frozen
class CountingBackend(Backend):
    """The torch backend, and how many bytes of live pages its kernels are given."""

    reads: Reads = attrs.field(eq=False)

    @property
    def name(self) -> str:
        """The name in `describe()`."""
        return "torch, counted"

    def attend(self, codec: PageCodec, device: torch.device) -> AttendKernel:
        """The torch kernel, counted."""
        kernel = TorchBackend().attend(codec, device)

        def counted(query: Tensor, pages: Pages, *, oldest: Tensor | None = None) -> Any:
            self.reads.nbytes += int((pages.live != 0).sum()) * codec.form.stride
            return kernel(query, pages, oldest=oldest)

        return counted

    def choose(self, selector: PageSelector, codec: PageCodec, device: torch.device) -> ChooseKernel:
        """The torch kernel."""
        return TorchBackend().choose(selector, codec, device)

    def seal(self, codec: PageCodec, selector: PageSelector | None, device: torch.device) -> SealKernel:
        """The torch kernel."""
        return TorchBackend().seal(codec, selector, device)


@attrs.frozen
class Result:
    """Of one composition: the share recalled, and bytes a sequence."""

    recalled: float
    stored: float
    read_a_token: float


def answer(
    model: Mixtral, cache: pikv.PiKVCache, batch: list[generate_data.Sample], chunk: int, reads: Reads
) -> Result:
    """Read the contexts, cut the cache, then ask token by token."""
    ids, start = small_model.ids_of(batch), batch[0].question_start
    small_model.read(model, cache, ids[:, :start], chunk)
    cache.finish_prefill()
    stored, reads.nbytes = cache.stored_bytes().total, 0
    right = small_model.answers(model, cache, ids, batch[0])
    return Result(
        recalled=float(right.double().mean()),
        stored=stored / len(batch),
        read_a_token=reads.nbytes / len(batch) / (ids.shape[1] - 1 - start),
    )


def measure(model: Mixtral, names: dict[str, Any], arguments: argparse.Namespace) -> Result:
    """One composition on all samples."""
    shape = small_model.shape_of(model)
    reads = Reads()
    runtime = attrs.evolve(pikv.runtime_from(names, shape), backends=[CountingBackend(reads)])
    results = [
        answer(model, pikv.PiKVCache(shape, runtime), batch, arguments.chunk, reads)
        for batch in small_model.batches(arguments.length, arguments.pairs, arguments.samples, arguments.batch)
    ]
    return Result(*(float(np.mean(column)) for column in zip(*map(attrs.astuple, results), strict=True)))


def table(results: dict[str, Result], arguments: argparse.Namespace) -> str:
    """A Markdown table; bytes are shares of the exact cache's."""
    exact = results["exact"]
    lines = [
        f"{arguments.pairs} pairs hidden in {arguments.length} characters, {arguments.samples} samples (seed {SEED}); "
        f"the prompt in chunks of {arguments.chunk}. Stored: when the questions begin, tail, indexes and tables "
        "included, as a share of the exact cache. Read: bytes of sealed pages given to attention for each token of the "
        "questions, as a share of the exact cache's.",
        "",
        tables.command(),
        "",
        "| composition | page size | recalled, % | stored | read |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        page_size = COMPOSITIONS[name].get("page_size", 64)
        stored, read = result.stored / exact.stored, result.read_a_token / exact.read_a_token
        lines.append(f"| {name} | {page_size} | {100 * result.recalled:.1f} | {stored:.3f} | {read:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every composition and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=small_model.MODEL)
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    parser.add_argument("--length", type=int, default=2048, help="characters of the text")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the prompt at a time")
    parser.add_argument("--only", nargs="*", default=list(COMPOSITIONS), choices=list(COMPOSITIONS), metavar="NAME")
    arguments = parser.parse_args()
    model = Mixtral(arguments.model, Solo())
    chosen = ["exact", *(name for name in arguments.only if name != "exact")]
    results = {name: measure(model, COMPOSITIONS[name], arguments) for name in tqdm(chosen)}
    text = table(results, arguments)
    tables.save(text, arguments.output)


if __name__ == "__main__":
    main()
