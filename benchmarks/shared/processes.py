"""Cases that measure memory, each in a process of its own, so that one does not find the memory of another."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from shared import tables

Measures = dict[str, int]


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest so far) of this process, from /proc."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def main(
    description: str | None,
    cases: Iterable[str],
    run_case: Callable[[str, int, int], Measures],
    table: Callable[[dict[str, Measures], argparse.Namespace], str],
    *,
    tokens: int,
) -> None:
    """The command line of a script: run every case of a prompt, and save the table.

    run_case: what one case measures, from its name, the prompt's tokens and the tokens of a chunk. tokens: by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--case", choices=list(cases), help="run this one here and print JSON")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments.case, arguments.tokens, arguments.chunk)))
        return
    results = {}
    for name in tqdm(list(cases)):
        command = [sys.executable, sys.argv[0], "--case", name]
        command += ["--tokens", str(arguments.tokens), "--chunk", str(arguments.chunk)]
        results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    tables.save(table(results, arguments), arguments.output)
