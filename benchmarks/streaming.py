"""Decoding with pages streamed to a store, beside decoding without.

    python benchmarks/streaming.py --folder . --output docs/tables/streaming.md

Caches of the same composition decode the same tokens in turns, so many steps each that every layer seals a page in
every turn. Keys, values and queries are random, and no model is run: what a model computes beside its cache would make
the difference smaller. A turn of one contestant is compared with the turn beside it of the one that does not stream.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
from shared import tables
from tqdm import tqdm

import pikv
from pikv.adapters.zarr_store import ZarrStreamer

MODEL = pikv.ModelConfig(layers=8, query_heads=32, kv_heads=8, head_dim=128)
TURN = 64  # steps: as many as a page has slots
COMMIT_EVERY = 4  # turns


@attrs.define
class Decoding:
    """One contestant: its cache, what it does after each step, and the seconds of its turns."""

    cache: pikv.PiKVCache
    after_step: Callable[[pikv.PiKVCache, int], object]
    seconds: list[float] = attrs.field(factory=list)


def nothing(cache: pikv.PiKVCache, step: int) -> None:
    """Streams not."""


def stream(cache: pikv.PiKVCache, step: int) -> None:
    """New pages after each step."""
    cache.stream()


def stream_and_commit(cache: pikv.PiKVCache, step: int) -> None:
    """New pages after each step, and a version now and then."""
    cache.stream()
    if step % (TURN * COMMIT_EVERY) == 0:
        cache.commit()


def commit(cache: pikv.PiKVCache, step: int) -> None:
    """A version now and then."""
    if step % (TURN * COMMIT_EVERY) == 0:
        cache.commit()


CASES = {
    "off": nothing,
    "stream() after each step": stream,
    f"and commit() every {TURN * COMMIT_EVERY} steps": stream_and_commit,
    f"commit() every {TURN * COMMIT_EVERY} steps alone": commit,
}


def prompt(folder: Path, tokens: int) -> pikv.PiKVCache:
    """A cache of so many tokens, all of whose pages are in its store."""
    cache = pikv.compose(MODEL, streamer=ZarrStreamer(folder, keep_versions=2))
    for layer_id in range(len(MODEL.layers)):
        cache.update(layer_id, 0, *torch.randn(2, 1, 8, tokens, 128))
    cache.finish_prefill()
    cache.commit()
    return cache


def turn(each: Decoding, start: int, states: torch.Tensor) -> None:
    """Decode TURN tokens from `start` on."""
    started = time.perf_counter()
    for step in range(start, start + TURN):
        for layer_id in range(len(MODEL.layers)):
            each.cache.update(layer_id, step, states[:, :8], states[:, 8:16])
            each.cache.attend(layer_id, states[:, 16:])
        each.after_step(each.cache, step)
    each.seconds.append(time.perf_counter() - started)


def run(folder: Path, tokens: int, turns: int) -> dict[str, Decoding]:
    """All contestants, in turns; the first turn is not measured."""
    cache = prompt(folder, tokens)
    contestants = {name: Decoding(cache.fork(), after_step) for name, after_step in CASES.items()}
    states = torch.randn(1, 48, 1, 128)
    for number in tqdm(range(turns + 1), desc="decode"):
        for each in contestants.values():
            turn(each, tokens + number * TURN, states)
    for each in contestants.values():
        del each.seconds[0]
    return contestants


def main() -> None:
    """Measure, and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="on the file system to measure")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt; a multiple of 64")
    parser.add_argument("--turns", type=int, default=8, help=f"of {TURN} steps; a multiple of {COMMIT_EVERY}")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.tokens % TURN or arguments.turns % COMMIT_EVERY or arguments.turns < 1:
        parser.error(f"--tokens must be a multiple of {TURN}, --turns one of {COMMIT_EVERY}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        contestants = run(Path(name), arguments.tokens, arguments.turns)
    plain = contestants["off"].seconds
    rows = []
    for case, each in contestants.items():
        ratios = [one / other for one, other in zip(each.seconds, plain, strict=True)]
        slower = f"{100 * (sum(each.seconds) / sum(plain) - 1):+.1f}"
        spread = f"{100 * (min(ratios) - 1):+.1f} to {100 * (max(ratios) - 1):+.1f}"
        rows.append((case, f"{1e3 * statistics.fmean(each.seconds) / TURN:.2f}", slower, spread))
    columns = ("streaming", "a step, ms", "slower, %", "by turn, %")
    sealed = MODEL.layers[0].kv_heads * len(MODEL.layers) * pikv.RuntimeConfig().form(MODEL, 0).stride
    text = "\n\n".join(
        [
            f"{len(MODEL.layers)} layers, 32 query heads, 8 KV heads, head_dim 128, float32; a prompt of "
            f"{arguments.tokens} tokens; {arguments.turns} turns of {TURN} steps, in each of which {sealed / 1e6:.1f} "
            f"MB of pages are sealed. No model beside the cache. {tables.machine()}.",
            tables.command(),
            tables.markdown(columns, rows).rstrip(),
        ]
    )
    tables.save(text + "\n", arguments.output)


if __name__ == "__main__":
    main()
