"""The command `pikv`: its subcommands, and what it says where something is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pikv
from pikv.cli import evaluate, inspect_store, plan
from pikv.core.errors import PiKVError

COMMANDS = (evaluate, inspect_store, plan)
WRONG_USE = 2  # the exit code, as argparse has it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What a user can mend is said in one line, without a traceback."""
    parser = argparse.ArgumentParser(prog="pikv", description="A KV cache of immutable pages and an exact tail.")
    parser.add_argument("--version", action="version", version=f"pikv {pikv.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except (PiKVError, OSError) as error:
        print(f"pikv: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print(f"pikv: interrupted; {given.interrupted}", file=sys.stderr)
        return 130
