"""The flags that all tasks have, parsed once."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "downstream_tasks" / "models" / "tiny_moe"
NEWEST = "newest"  # what --resume without a folder asks for
DTYPES = ("float32", "bfloat16", "float16")


def positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    """A type for argparse: a number above 0."""

    def read(text: str) -> int | float:
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return number

    read.__name__ = f"positive {kind.__name__}"
    return read


def parser(
    description: str | None, *, train_samples: int, eval_samples: int, max_tokens: int
) -> argparse.ArgumentParser:
    """The common flags, with a task's own sizes as defaults; a task adds what it alone has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_common(made)
    _add_loop(made)
    sizes = made.add_argument_group("sizes of the task")
    sizes.add_argument("--train_samples", type=positive(int), default=train_samples, help="at most so many")
    sizes.add_argument("--eval_samples", type=positive(int), default=eval_samples, help="at most so many, held out")
    sizes.add_argument("--validation", action="store_true", help="evaluate on other files, to choose flags by")
    sizes.add_argument("--max_tokens", type=positive(int), default=max_tokens, help="of a sample; the rest is cut off")
    return made


def _add_common(made: argparse.ArgumentParser) -> None:
    common = made.add_argument_group("common to all tasks")
    common.add_argument("--model", default=str(SHIPPED), help="a transformers folder or hub name; the shipped MoE")
    common.add_argument("--data", type=Path, help="your own file or folder; made from installed text when left out")
    common.add_argument("--output", type=Path, required=True, help="the folder for checkpoints, model and results")
    common.add_argument("--model_type", choices=("single", "distributed"), default="single")
    common.add_argument("--use_lora", action="store_true", help="train low-rank adapters alone (peft)")
    common.add_argument("--rank", type=positive(int), default=4, help="of the adapters")
    common.add_argument("--alpha", type=positive(float), default=1.0, help="adapters are scaled by alpha / rank")
    common.add_argument(
        "--batch_size", type=positive(int), default=32, help="samples a step, of all processes together"
    )
    common.add_argument("--learning_rate", type=positive(float), default=1e-4)
    common.add_argument("--num_epochs", type=positive(int), default=10)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument(
        "--resume", nargs="?", const=NEWEST, help="a checkpoint's folder; the newest in --output if none"
    )
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    common.add_argument("--dtype", choices=DTYPES, default="float32", help="of the arithmetic; weights stay float32")
    common.add_argument("--eval_only", action="store_true", help="evaluate --model as it is")
    common.add_argument("--config", type=Path, help="a TOML or JSON file of flags; the command line wins")
    common.add_argument(
        "--cache", nargs="+", metavar="COMPOSITION", default=None, help="such as pyramid+snapkv+int4@1/10, or a file"
    )


def _add_loop(made: argparse.ArgumentParser) -> None:
    loop = made.add_argument_group("the training loop")
    loop.add_argument("--gradient_accumulation", type=positive(int), default=1, help="parts that a step is taken in")
    loop.add_argument("--max_grad_norm", type=positive(float), default=1.0)
    loop.add_argument("--warmup_steps", type=int, default=20)
    loop.add_argument("--load_balance", type=float, default=0.01, help="weight of the experts' load-balance loss")
    loop.add_argument("--expert_parallel", action="store_true", help="split each layer's experts over the processes")
    loop.add_argument("--logging_steps", type=positive(int), default=10)
    loop.add_argument("--save_steps", type=positive(int), help="steps between checkpoints; an epoch if left out")
    loop.add_argument("--timeout_s", type=positive(int), default=600, help="how long a process waits for another")


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; flags from a --config file come first, so that the command line's win."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(given)[0].config
    flags = made.parse_args([*(_from_file(made, file) if file else []), *given])
    _check(made, flags)
    return flags


def _from_file(made: argparse.ArgumentParser, file: Path) -> list[str]:
    try:
        text = file.read_text()
        values = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        made.error(f"--config {file} must be a TOML or JSON file of flags: {error}")
    known = [action.dest for action in made._actions if action.option_strings]  # argparse has no public list
    line: list[str] = []
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            made.error(
                f"--config {file} has {key!r}, which is no flag; "
                + (f"did you mean {close[0]!r}?" if close else "see --help")
            )
        if value is not False:
            line += [f"--{key}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    return line


def _check(made: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    if flags.dtype == "float16" and flags.device == "cpu":
        made.error("--dtype float16 trains on a GPU only; use --dtype bfloat16, or --device cuda")
    if flags.device.startswith("cuda") and not torch.cuda.is_available():
        made.error(f"--device {flags.device} is not there: torch finds no GPU; use --device cpu")
    if flags.output.exists() and not flags.output.is_dir():
        made.error(f"--output {flags.output} is a file; name a folder, which is made if it is missing")
    if flags.validation and flags.data:
        made.error("--validation is of the generated data; give --data the split to choose flags by")
    if flags.expert_parallel and flags.model_type != "distributed":
        made.error("--expert_parallel splits experts over processes; add --model_type distributed, or leave it out")
    if flags.expert_parallel and flags.use_lora:
        made.error("--expert_parallel trains whole experts; adapters are small, so --use_lora needs no splitting")
    if flags.expert_parallel and flags.dtype == "float16":
        made.error("--expert_parallel clips gradients that are not scaled; use --dtype bfloat16 or float32")
    if flags.eval_only and flags.resume:
        made.error("--eval_only trains nothing, so there is nothing to --resume; leave one out")
