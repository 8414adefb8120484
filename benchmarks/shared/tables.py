"""What every benchmark does with its results: print them, and save them with the command that made them."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs
import torch


def command() -> str:
    """The command line of this run, as a Markdown block."""
    return "    " + shlex.join(["python", *sys.argv])


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def save(text: str, output: Path | None) -> None:
    """Print a text, and write it to a file if there is one."""
    print(text)
    if output:
        write(text, output)


def write(text: str, output: Path) -> None:
    """Write a file, and the folders it lies in."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)


def save_csv(rows: Sequence[attrs.AttrsInstance], output: Path | None) -> None:
    """Write attrs objects of one class, a column a field."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in attrs.fields(type(rows[0])))
            writer.writerows(map(attrs.astuple, rows))


def machine() -> str:
    """The processor, the threads and what pins them, and the versions that a time depends on."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    pinned = " ".join(f"{key}={os.environ[key]}" for key in sorted(os.environ) if key.startswith(("OMP_", "GOMP_")))
    return (
        f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
        f"{f' ({pinned})' if pinned else ''}, torch {torch.__version__}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
