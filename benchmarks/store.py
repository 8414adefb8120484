"""Commits and restores beside raw writes and reads of as many bytes, on one file system.

    python benchmarks/store.py --folder . --output docs/tables/store.md

Contestants take turns. A raw write is one `pwrite` of everything into a new file, and `fsync`; a raw read fills new
memory by one `preadv`. Files are in the system's page cache when they are read, as they are after a commit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from shared import tables
from tqdm import tqdm

import pikv
from pikv.adapters.zarr_store import ZarrStreamer
from pikv.core.files import as_buffer, read_at, write_at
from pikv.core.ports import Manifest

KIBIBYTE = 1024


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


class Raw:
    """One file, written and read at once."""

    def __init__(self, folder: Path, states: torch.Tensor) -> None:
        self.folder, self.states = folder, states

    def write(self) -> None:
        path = self.folder / "raw"
        path.unlink(missing_ok=True)
        file = os.open(path, os.O_CREAT | os.O_WRONLY)
        write_at(file, as_buffer(self.states), 0)
        os.fsync(file)
        os.close(file)

    def read(self) -> None:
        out = torch.empty_like(self.states)
        file = os.open(self.folder / "raw", os.O_RDONLY)
        read_at(file, as_buffer(out), 0)
        os.close(file)


def pages_case(folder: Path, page_bytes: int, nbytes: int, rounds: int, progress: tqdm) -> dict[str, float]:
    """A streamer alone: append and commit, read all, read pages here and there."""
    count = nbytes // page_bytes
    pages = torch.randint(0, 256, (count, page_bytes), dtype=torch.uint8)
    keys, raw = torch.arange(count), Raw(folder, pages)
    some = torch.randperm(count)[: min(count, 4096)]
    times: dict[str, list[float]] = {name: [] for name in ("write", "commit", "pread", "read", "scattered")}
    for _ in range(rounds):
        shutil.rmtree(folder / "store", ignore_errors=True)
        times["write"].append(timed(raw.write))
        with ZarrStreamer(folder / "store") as streamer:
            manifest = Manifest(facts={}, states={}, pages={page_bytes: keys})

            def commit(streamer: ZarrStreamer = streamer, manifest: Manifest = manifest) -> None:
                for part in keys.split(max(1, (32 << 20) // page_bytes)):
                    streamer.append(part, pages[int(part[0]) : int(part[-1]) + 1])
                streamer.commit(manifest)

            times["commit"].append(timed(commit))
            version = streamer.versions()[-1]
            streamer.manifest(version)
            times["pread"].append(timed(raw.read))
            times["read"].append(
                timed(lambda: streamer.read(version, keys, torch.empty(count, page_bytes, dtype=torch.uint8)))  # noqa: B023  # called at once
            )
            out = torch.empty(len(some), page_bytes, dtype=torch.uint8)
            times["scattered"].append(timed(lambda: streamer.read(version, keys[some], out)))  # noqa: B023  # called at once
        progress.update()
    middle = {name: statistics.median(each) for name, each in times.items()}
    return {
        "write_mb_s": nbytes / middle["write"] / 1e6,
        "commit": middle["write"] / middle["commit"],
        "pread_mb_s": nbytes / middle["pread"] / 1e6,
        "read": middle["pread"] / middle["read"],
        "scattered": len(some) / middle["scattered"],
    }


def cache_case(folder: Path, nbytes: int, rounds: int, progress: tqdm) -> dict[str, float]:
    """A cache of pages of 16 KiB: commit, and restore into new memory."""
    model = pikv.ModelConfig(layers=8, query_heads=8, kv_heads=8, head_dim=32)
    page_bytes = pikv.RuntimeConfig().form(model, 0).stride
    tokens = nbytes // (page_bytes * 8 * 8) * 64 + 128
    states = torch.randn(2, 1, 8, tokens, 32)
    times: dict[str, list[float]] = {name: [] for name in ("write", "commit", "pread", "restore")}
    for _ in range(rounds):
        shutil.rmtree(folder / "store", ignore_errors=True)
        with ZarrStreamer(folder / "store") as streamer:
            cache = pikv.compose(model, streamer=streamer)
            for layer_id in range(8):
                cache.update(layer_id, 0, *states)
            cache.finish_prefill()
            raw = Raw(folder, torch.ones(cache.stored_bytes().pages + cache.stored_bytes().tail, dtype=torch.uint8))
            times["write"].append(timed(raw.write))
            times["commit"].append(timed(cache.commit))
            cache.reset()
            times["pread"].append(timed(raw.read))
            times["restore"].append(timed(lambda: pikv.PiKVCache.restore(model, cache.runtime)))  # noqa: B023  # called at once
        progress.update()
    middle = {name: statistics.median(each) for name, each in times.items()}
    return {
        "write_mb_s": len(raw.states) / middle["write"] / 1e6,
        "commit": middle["write"] / middle["commit"],
        "pread_mb_s": len(raw.states) / middle["pread"] / 1e6,
        "restore": middle["pread"] / middle["restore"],
    }


def main() -> None:
    """Measure, and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="on the file system to measure")
    parser.add_argument("--mib", type=int, default=256, help="of pages")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    columns = ("page, KiB", "raw write, MB/s", "commit, of raw", "raw read, MB/s", "read, of raw", "scattered pages/s")
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, tqdm(total=4 * arguments.rounds) as progress:
        folder, nbytes = Path(name), arguments.mib << 20
        for size in (4, 16, 64):
            case = pages_case(folder, size * KIBIBYTE, nbytes, arguments.rounds, progress)
            shown = (f"{value:.0f}" if value > 10 else f"{value:.2f}" for value in case.values())
            rows.append((size, *shown))
        whole = cache_case(folder, nbytes, arguments.rounds, progress)
        shown = (f"{value:.0f}" if value > 10 else f"{value:.2f}" for value in whole.values())
        rows.append(("16, a whole cache", *shown, ""))
    lines = (
        f"{arguments.mib} MiB of pages, medians of {arguments.rounds} rounds. {tables.machine()}. Reads are checked.",
        tables.command(),
        tables.markdown(columns, rows).rstrip(),
    )
    tables.save("\n\n".join(lines) + "\n", arguments.output)


if __name__ == "__main__":
    main()
