"""`pikv eval`: what a cache costs in quality, and what it saves in bytes."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from pikv.compositions import parse
from pikv.core.errors import ConfigError, InputError

EXAMPLES = """examples:
  pikv eval downstream_tasks/models/tiny_moe --cache int4 --cache keydiff+int4+page_size=16+tail_tokens=32@1/10
  pikv eval MODEL --cache-file caches.txt --task recall --pairs 8 32 --depth 0 0.5 1 --samples 96 --output results
  pikv eval MODEL --cache snapkv+tail_tokens=64@1/4 --task questions.jsonl --task text --text book.txt
  pikv eval MODEL --cache int4 --quantized 4 --press KnormPress:0.9 --press SnapKVPress:0.75

A composition joins parts by +, and may end in the share of the full cache's bytes that its pages may take, after @.
A file has one composition a line, or a name, a colon and a composition; lines that begin with # are left out. Scores
are kept as they come: the same command, run again, goes on where it ended.
"""


def add_to(commands: Any) -> None:
    """Add the command to those of `pikv`."""
    parser = commands.add_parser(
        "eval",
        help="judge caches by a model's answers, beside their bytes",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, interrupted="what was scored is kept, and the same command goes on from there")
    parser.add_argument("model", help="a folder, or a name of a hub, that transformers can load a causal model from")
    contestants = parser.add_argument_group("contestants, beside the full cache")
    contestants.add_argument("--cache", action="append", default=[], metavar="COMPOSITION", help="may be given again")
    contestants.add_argument("--cache-file", type=Path, metavar="FILE", help="compositions, one a line")
    contestants.add_argument("--quantized", type=int, nargs="*", default=[], metavar="BITS", help="QuantizedCache")
    contestants.add_argument("--quantized-backend", choices=("quanto", "hqq"), default="quanto")
    contestants.add_argument("--press", nargs="*", default=[], metavar="NAME:REMOVED", help="presses of kvpress")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--task",
        action="append",
        metavar="TASK",
        help="recall (the default), text, or a JSONL file of objects with prompt, answer and perhaps context",
    )
    tasks.add_argument("--text", type=Path, help="what passages are taken from; the standard library's sources else")
    tasks.add_argument("--length", type=int, nargs="+", default=[2048], help="characters of a context")
    tasks.add_argument("--pairs", type=int, nargs="+", default=[8], help="of recall: hidden in each context")
    tasks.add_argument("--depth", type=float, nargs="+", default=[None], help="of recall: 0 to 1; anywhere by default")
    tasks.add_argument("--known", action="store_true", help="of recall: the question is read before the cache is cut")
    tasks.add_argument("--follow", type=int, default=128, help="of text: characters that are foretold")
    tasks.add_argument("--samples", type=int, default=48, help="contexts of each task that is made here")
    tasks.add_argument("--seed", type=int, default=0)
    running = parser.add_argument_group("running")
    running.add_argument("--dtype", default="auto", help="of the model, such as float16; its own by default")
    running.add_argument("--device", default="cpu")
    running.add_argument("--batch", type=int, default=16)
    running.add_argument("--chunk", type=int, default=512, help="tokens of a context at a time")
    running.add_argument("--output", type=Path, help="a folder for scores.jsonl, results.csv, results.md and plots")
    running.add_argument("--json", action="store_true", help="print rows as JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, report, save."""
    for name in ("samples", "batch", "chunk"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be 1 or more, got {getattr(arguments, name)}")
    from pikv.evaluation import report
    from pikv.evaluation.results import Results

    tasks = list(_tasks(arguments))  # before the model is loaded: what is wrong with them is found at once
    named = list(_compositions(arguments))
    output: Path | None = arguments.output
    if output:
        output.mkdir(parents=True, exist_ok=True)
    results = Results(output / "scores.jsonl" if output else None)
    model, tokenizer = _load(arguments)
    rows = _score_all(arguments, model, tokenizer, tasks, named, results)
    heading = (
        "Right: the share of answers whose every token is the most likely one. Lost: against the full cache on the "
        "same items, with a 95 % interval (paired bootstrap). Stored, tail and read are shares of the full cache's "
        f"bytes, {model.dtype} like the model; stored includes the tail. Read: of sealed pages and indexes, by each "
        "token of a question. A star: no other has as much quality in as few bytes.\n\n    "
        + shlex.join(["pikv", *sys.argv[1:]])
    )
    text = report.markdown(rows, heading)
    print(json.dumps([attrs.asdict(row) for row in rows], indent=2) if arguments.json else text)
    if output:
        (output / "results.md").write_text(text)
        report.save_csv(rows, output / "results.csv")
        _plot(rows, output)
    return 0


def _plot(rows: list[Any], output: Path) -> None:
    from pikv.evaluation import report

    try:
        for axis in ("stored", "read"):
            report.plot(rows, axis, output / f"{axis}.svg")
    except ImportError as error:
        print(f"no plots: {error}; pip install pikv[plots]", file=sys.stderr)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of the weights, which would hide the one that matters

    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype, None)
    if not (dtype == "auto" or isinstance(dtype, torch.dtype)):
        raise InputError(f"--dtype must be auto, float32, bfloat16 or float16, got {arguments.dtype!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise InputError(f"{arguments.model}: transformers cannot load a causal model from it: {error}") from error
    return model.to(arguments.device).eval(), tokenizer


def _tasks(arguments: argparse.Namespace) -> Iterator[Any]:
    from pikv.evaluation.recall import recall, standard_library
    from pikv.evaluation.texts import continuation, from_jsonl

    text = arguments.text.read_text(encoding="utf-8") if arguments.text else standard_library(held_out=True)
    made = {"samples": arguments.samples, "seed": arguments.seed}
    for name in arguments.task or ["recall"]:
        if name == "recall":
            for length in arguments.length:
                for pairs in arguments.pairs:
                    for depth in arguments.depth:
                        yield recall(text, length=length, pairs=pairs, depth=depth, known=arguments.known, **made)
        elif name == "text":
            for length in arguments.length:
                yield continuation(text, length=length, follow=arguments.follow, **made)
        elif Path(name).suffix == ".jsonl":
            yield from_jsonl(Path(name))
        else:
            raise InputError(f"--task must be recall, text or a .jsonl file, got {name!r}")


def _compositions(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Names and compositions."""
    lines = arguments.cache_file.read_text(encoding="utf-8").splitlines() if arguments.cache_file else []
    for line in [*arguments.cache, *lines]:
        if line.strip() and not line.lstrip().startswith("#"):
            name, colon, text = line.partition(":")
            yield name.strip(), parse(text if colon else name)


def _contestants(
    arguments: argparse.Namespace, named: list[tuple[str, Any]]
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Names, and what makes a contestant for texts of so many tokens on a model of this shape."""
    from pikv.evaluation.contestants import Composed, Press, Quantized

    for name, composition in named:
        yield name, lambda shape, tokens, n=name, c=composition: Composed(name=n, runtime=c.names_for(shape, tokens))
    for bits in arguments.quantized:
        cache = Quantized(bits=bits, backend=arguments.quantized_backend)
        yield cache.name, lambda *_, made=cache: made
    for text in arguments.press:
        name, _, removed = text.partition(":")
        try:
            press = Press(press=name, ratio=float(removed))
        except ValueError as error:
            raise ConfigError(f"--press must be a name and a share, as in KnormPress:0.9, got {text!r}") from error
        yield press.name, lambda *_, made=press: made


def _score_all(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    tasks: list[Any],
    named: list[tuple[str, Any]],
    results: Any,
) -> list[Any]:
    """A row for each task and contestant, the full cache first."""
    from tqdm import tqdm

    from pikv.adapters.transformers.families import model_config
    from pikv.evaluation.contestants import Full
    from pikv.evaluation.report import row_of
    from pikv.evaluation.run import encode

    shape, full = model_config(model), Full()
    contestants = [(full.name, lambda *_: full), *_contestants(arguments, named)]
    rows = []
    with tqdm(total=sum(len(task.items) for task in tasks) * len(contestants), unit="item") as progress:
        for task in tasks:
            tokens = max(len(encode(tokenizer, item).context) for item in task.items)
            scores: dict[str, Any] = {}
            for name, made in contestants:
                progress.set_postfix_str(name)
                scores[name] = _scores(arguments, model, tokenizer, made(shape, tokens), task, results, progress)
                rows.append(row_of(task, name, scores[name], scores[full.name]))
    return rows


def _scores(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, contestant: Any, task: Any, results: Any, progress: Any
) -> Any:
    """Of a contestant on a task, those that were kept and those still to be made."""
    from pikv.evaluation.results import key_of
    from pikv.evaluation.run import evaluate

    key = key_of(attrs.asdict(task), arguments.model, str(model.dtype), arguments.chunk, repr(contestant))
    kept = results.of(contestant.name, task.name, key)
    progress.update(len(kept))

    def scored(item: int, score: Any) -> None:
        results.add(contestant.name, task.name, key, item, score)
        progress.update()

    sizes = {"batch": arguments.batch, "chunk": arguments.chunk}
    evaluate(model, tokenizer, contestant, task, **sizes, done=frozenset(kept), scored=scored)
    return kept
