"""`pikv plan`: how many bytes a model's cache will take, what fits, and how long a token will take to read it."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from pikv.core.errors import InputError

if TYPE_CHECKING:
    from pikv.compositions import Composition
    from pikv.planning.rows import Workload
    from pikv.planning.shapes import Shape

EXAMPLES = """examples:
  pikv plan mixtral-8x7b --context 32768 --batch 16
  pikv plan deepseek-v3 --context 131072 --ranks 16 --memory 80GB --weight-bits 8
  pikv plan path/to/model --cache int4 --cache keydiff+int4@1/10 --memory 24GB --bandwidth 1000 --plot plan.svg
  pikv plan qwen3-30b-a3b --context 65536 --link 12.5 --tflops 400 --json

Bytes are what `stored_bytes()` of such a cache would say, positions, tables and tail included. Times are what memory,
link and arithmetic take at the rates that you state, nothing else: a bound, not a measurement.
"""

USUAL = ("exact", "int8", "int4", "keydiff+int4@1/10", "key_codes+int4")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_to(commands: Any) -> None:
    """Add the command to those of `pikv`."""
    parser = commands.add_parser(
        "plan",
        help="foretell a cache's bytes, what fits, and the time to read it",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", help="one that is built in (`pikv plan list` names them), a folder, or a hub's name")
    parser.add_argument("--cache", action="append", metavar="COMPOSITION", help="may be given again")
    parser.add_argument("--context", type=int, default=32768, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of keys and values (default: %(default)s)")
    machines = parser.add_argument_group("machines, as far as you know them")
    machines.add_argument("--ranks", type=int, default=1, help="equal machines that share weights and cache")
    machines.add_argument("--memory", type=_bytes, metavar="SIZE", help="of each, such as 80GB or 24GiB")
    machines.add_argument("--weight-bits", type=float, default=16.0, help="of a parameter (default: 16)")
    machines.add_argument("--bandwidth", type=float, metavar="GB/s", help="of each one's memory")
    machines.add_argument("--link", type=float, metavar="GB/s", help="between ranks, or from where caches are stored")
    machines.add_argument("--tflops", type=float, metavar="N", help="10^12 operations a second, of each")
    output = parser.add_argument_group("output")
    output.add_argument("--layers", action="store_true", help="MiB of each layer too")
    output.add_argument("--plot", type=Path, metavar="FILE", help="bytes against context")
    output.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Plan and print."""
    from pikv.compositions import parse
    from pikv.planning import report
    from pikv.planning.known import KNOWN
    from pikv.planning.rows import plan, wire

    if arguments.model == "list":
        print("\n".join(KNOWN))
        return 0
    compositions = [parse(text) for text in arguments.cache or USUAL]
    works = _workloads(arguments)
    found = []
    for cached, work in works.items():
        rows = [plan(work, composition) for composition in compositions]
        across = wire(work, compositions[0]) if arguments.ranks > 1 else None
        found.append(
            {
                "model": work.shape.name,
                "cached": cached,
                "rows": [attrs.asdict(row) for row in rows],
                "wire": None if across is None else attrs.asdict(across),
            }
        )
        if not arguments.json:
            print(report.markdown(work, cached, rows, across))
            print(report.layers(rows) if arguments.layers else "", end="")
    if arguments.json:
        print(json.dumps(found, indent=2))
    if arguments.plot:
        _plot(arguments.plot, next(iter(works.values())), compositions)
    return 0


def _workloads(arguments: argparse.Namespace) -> dict[str, Workload]:
    """By how the model's keys and values are cached."""
    from pikv.planning.rows import Machines, Workload

    shape = _shape(arguments.model, arguments.dtype)
    machines = Machines(
        ranks=arguments.ranks,
        weight_bits=arguments.weight_bits,
        memory_bytes=arguments.memory,
        memory_bandwidth=_times(arguments.bandwidth, 1e9),
        link=_times(arguments.link, 1e9),
        flops=_times(arguments.tflops, 1e12),
    )
    ways = {"keys and values": shape.model}
    if shape.expanded is not None:
        ways = {"latents": shape.model, "expanded heads": shape.expanded}
    return {
        cached: Workload(shape=shape, model=model, machines=machines, tokens=arguments.context, batch=arguments.batch)
        for cached, model in ways.items()
    }


def _shape(name: str, dtype: str) -> Shape:
    """Of a model whose numbers are built in, or of whatever transformers can find a config of."""
    import torch

    from pikv.planning.known import KNOWN
    from pikv.planning.shapes import shape_of

    stored = getattr(torch, dtype, None)
    if not isinstance(stored, torch.dtype):
        raise InputError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if name in KNOWN:
        return shape_of(name, KNOWN[name], dtype=stored)
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise InputError(
            f"{name!r} is not a model whose numbers are built in ({', '.join(KNOWN)}); to read a config of your own, "
            "pip install pikv[transformers]"
        ) from error
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: neither a model whose numbers are built in ({', '.join(KNOWN)}), nor a config that transformers "
            f"can load: {error}"
        ) from error
    return shape_of(name, config.to_dict(), dtype=stored)


def _bytes(text: str) -> int:
    """A size such as 80GB or 24GiB."""
    read = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    if read is None or read[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(
            f"a size must be a number and perhaps one of {', '.join(_UNITS)[2:]}: {text!r}"
        )
    return int(float(read[1]) * _UNITS[read[2].upper()])


def _times(number: float | None, unit: float) -> float | None:
    return None if number is None else number * unit


def _plot(path: Path, work: Workload, compositions: list[Composition]) -> None:
    from pikv.planning import report

    try:
        report.plot(work, compositions, path)
    except ImportError as error:
        raise InputError(f"--plot: {error}; pip install pikv[plots]") from error
