"""Decode greedily with a Mixtral whose experts and whose KV pages are spread over ranks, of MPI or of torchrun.

Expert e lives at rank e % ranks; each rank stores the keys and values of its own KV heads, of its own token ranges, or
of the tokens that its experts are best for (--shard-by; the heads and the ranks decide otherwise). Partial attention is
merged by its log-sum-exp. Every rank checks, by bytes, that it holds no more than that, and what is sent is counted.

Examples:
  python examples/moe_decode.py                                one rank, the default prompt
  mpirun -n 4 python examples/moe_decode.py --verify           four ranks, against a dense decoder
  mpirun -n 2 python examples/moe_decode.py --prompt 'import os' --tokens 50 --shard-by token_range
  torchrun --nproc_per_node 2 examples/moe_decode.py --verify
  mpirun -n 2 python examples/moe_decode.py --far-tier 2:1 --verify     pages in slower memory, fetched ahead
  python examples/moe_decode.py --budget-tokens 512 --token-selector recent --verify    how much a budget costs
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import attrs
import torch
from mixtral import Cache, DenseCache, Mixtral, MixtralConfig
from moe_checks import TOLERANCE, Agreement, Homes, Stored, excesses, expert_costs, table
from moe_compose import CHOSEN, Composed, compose, far_tier, slow_rank
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

import pikv
from pikv.core.ports.transport import Solo, Transport

MODEL = Path(__file__).parents[1] / "downstream_tasks" / "models" / "tiny_moe"
PAIRS = {"B": "ek", "Q": "xy", "7": "no", "W": "da"}  # hidden in the default prompt
LAUNCHED = ("PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE")  # what mpirun of MPICH, of PMIx, of Open MPI sets

Value = TypeVar("Value")


def default_prompt() -> str:
    """Source of the standard library with pairs hidden in it, about 1500 characters; two answers and a question."""
    rows = inspect.getsource(textwrap)[:1440].split("\n")
    for number, (key, value) in enumerate(PAIRS.items()):
        rows.insert(3 + 7 * number, f"@{key}{value}")
    return "\n".join([*rows, f"@B{PAIRS['B']}", f"@7{PAIRS['7']}", "@Q"])


class Parser(argparse.ArgumentParser):
    """Raises what is wrong with the arguments, so that one rank says it once."""

    def error(self, message: str) -> NoReturn:
        """Raise pikv.InputError."""
        raise pikv.InputError(f"{message}; see --help")


def count(text: str) -> int:
    """An argument that counts something: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number, 1 or more, got {text!r}")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; pikv.InputError if it is wrong."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="moe_decode.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="text to go on from (default: code that hides lines such as `@Qxy`)")
    prompts.add_argument("--prompt-file", type=Path, help="a file with that text, UTF-8")
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder in Mixtral's format, with tokenizer.json")
    parser.add_argument("--tokens", type=count, default=200, help="how many to decode (default: 200)")
    parser.add_argument("--chunk", type=count, default=512, help="tokens of the prompt computed at once (default: 512)")
    parser.add_argument("--verify", action="store_true", help="compare every step with a dense decoder on one rank, "
                        "whose tokens are used; exit with 1 unless all tokens agree and logits are within 1e-4, which "
                        "lossy parts are not meant to reach")  # fmt: skip
    cache = parser.add_argument_group("the cache", "names and numbers for pikv.runtime_from; its defaults are exact")
    for name in CHOSEN:
        cache.add_argument(f"--{name.replace('_', '-')}", metavar="NAME")
    cache.add_argument("--budget-tokens", type=count, help="mean tokens kept, for each layer and KV head")
    cache.add_argument("--page-size", type=count, help="tokens a page: 16, 32 or 64")
    cache.add_argument("--tail-tokens", type=count, help="newest tokens that stay dense")
    ranks = parser.add_argument_group("ranks and memory")
    ranks.add_argument("--far-tier", type=far_tier, metavar="MS:GB", help="keep only a part of the pages near, others "
                       "in a model of slower memory: so many ms and GB/s for a batch, for instance 2:1")  # fmt: skip
    ranks.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True,
                       help="fetch the next layer's pages while ranks exchange answers (default: yes)")  # fmt: skip
    ranks.add_argument("--timeline", type=Path, metavar="FILE", help="write when each collective and the work beside "
                       "it ran, as a Chrome trace, which Perfetto opens")  # fmt: skip
    ranks.add_argument("--slow-rank", type=slow_rank, metavar="RANK:MS", default=(0, 0.0), help="a model of a slow "
                       "rank: its experts take so many ms longer for a token, for a router to avoid")  # fmt: skip
    return parser.parse_args(argv)


def open_transport() -> Transport:
    """The transport of the ranks that mpirun or torchrun started, or of one rank; PiKVError if there can be none."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # which torchrun sets
        from pikv.adapters.torch_distributed import TorchTransport

        return TorchTransport.from_environment()
    if not any(name in os.environ for name in LAUNCHED):
        return Solo()
    if int(os.environ.get("PMI_SIZE", 1)) > (os.cpu_count() or 1):
        os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")  # ranks that wait leave the cores to the others
    try:
        from pikv.adapters.mpi import MpiTransport, abort_when_uncaught
    except ImportError as error:
        raise pikv.InputError(f"several ranks need mpi4py ({error}); pip install 'pikv[mpi]'") from error
    abort_when_uncaught()
    return MpiTransport()


@attrs.define
class Decoder:
    """A model and a cache, fed with one sequence."""

    model: Mixtral
    cache: Cache
    position: int = 0
    seconds: float = 0.0

    def feed(self, token_ids: Tensor) -> Tensor:
        """Run token_ids [tokens]; return the last one's logits [vocabulary]."""
        started = time.perf_counter()
        logits = self.model.step(token_ids[None], self.position, self.cache)[0]
        self.seconds += time.perf_counter() - started
        self.position += len(token_ids)
        return logits

    def prefill(self, token_ids: Tensor, chunk: int) -> Tensor:
        """Run a prompt in chunks; return its last token's logits [vocabulary]."""
        return [self.feed(part) for part in token_ids.split(chunk)][-1]


@attrs.frozen(kw_only=True)
class Session:
    """All that a rank needs to decode. `dense` is the reference, on rank 0 with --verify."""

    arguments: argparse.Namespace
    tokenizer: Tokenizer
    prompt: str
    prompt_ids: Tensor
    model: Mixtral
    cache: pikv.PiKVCache
    parts: Composed
    homes: Homes | None
    dense: Decoder | None

    @classmethod
    def prepare(cls, argv: Sequence[str] | None, transport: Transport) -> Session:
        """Read the arguments, load the model, compose the cache; PiKVError or OSError tell the user's mistakes."""
        arguments = parse(argv)
        config = MixtralConfig.read(arguments.model)
        tokenizer = read_tokenizer(arguments.model)
        prompt = read_prompt(arguments)
        prompt_ids = torch.tensor(tokenizer.encode(prompt).ids)
        if not len(prompt_ids):
            raise pikv.InputError("the prompt must have at least one token, got none; pass some text")
        parts = compose(arguments, config, transport, len(prompt_ids) + arguments.tokens)
        cache, wire = parts.cache, parts.wire
        homes = Homes(cache, transport.size) if cache.waits_for_route else None
        router, routed = cache.runtime.router, None if homes is None else homes.route
        slow, slow_s = arguments.slow_rank
        dense = None
        if arguments.verify and transport.rank == 0:
            dense = Decoder(Mixtral(arguments.model, Solo()), DenseCache(config))
        return cls(
            arguments=arguments,
            tokenizer=tokenizer,
            prompt=prompt,
            prompt_ids=prompt_ids,
            model=Mixtral(arguments.model, wire.experts, router, routed, slow_s if slow == transport.rank else 0.0),
            cache=cache,
            parts=parts,
            homes=homes,
            dense=dense,
        )


def read_prompt(arguments: argparse.Namespace) -> str:
    """The text to go on from."""
    if arguments.prompt_file:
        return arguments.prompt_file.read_text("utf-8")
    return default_prompt() if arguments.prompt is None else arguments.prompt


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder; InputError if there is none."""
    if not (folder / "tokenizer.json").is_file():
        raise pikv.InputError(f"{folder} has no tokenizer.json; copy the whole folder")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def on_all_ranks(transport: Transport, prepare: Callable[[], Value]) -> Value | None:
    """Call `prepare` on every rank. If it fails on one, its error is said once and every rank gets None."""
    error, value = None, None
    try:
        value = prepare()
    except (pikv.PiKVError, OSError, UnicodeError) as caught:
        error = caught
    failed = transport.all_gather(torch.tensor(error is not None)).nonzero()
    if error is not None and transport.rank == failed[0]:
        complain(error)
    return None if len(failed) else value


def complain(problem: object) -> None:
    """Say in one line what is wrong."""
    print(f"moe_decode.py: error: {problem}", file=sys.stderr)


def decode(session: Session, decoder: Decoder, agreement: Agreement) -> int:
    """Decode and print as it goes, comparing with the dense decoder if there is one; return how many tokens."""
    dense, chunk, stream = session.dense, session.arguments.chunk, DecodeStream(skip_special_tokens=True)
    print(session.prompt.rpartition("\n")[2], end="", flush=True)
    logits = decoder.prefill(session.prompt_ids, chunk)
    dense_logits = dense.prefill(session.prompt_ids, chunk) if dense else logits
    session.cache.finish_prefill()  # evicts and seals now, so that the time below is decoding alone
    decoder.seconds = 0.0
    session.parts.wire.begin()
    for decoded in range(session.arguments.tokens):
        if dense:
            agreement.add(logits, dense_logits)
        token = session.model.transport.broadcast(dense_logits.argmax(), root=0)
        if int(token) in session.model.config.end_ids:
            return decoded
        print(stream.step(session.tokenizer, int(token)) or "", end="", flush=True)
        logits = decoder.feed(token[None])
        dense_logits = dense.feed(token[None]) if dense else logits
    return session.arguments.tokens


def run(session: Session, transport: Transport) -> int:
    """Decode, report, check; return the exit code."""
    decoder, agreement = Decoder(session.model, session.cache), Agreement()
    tokens = decode(session, decoder, agreement)
    stored = Stored.everywhere(session.model, session.cache)
    problems = excesses(session.model, session.cache, stored, decoder.position, session.homes)

    sent = session.parts.wire.report(stored, tokens)
    if session.arguments.timeline is not None:
        session.parts.write_timeline(session.arguments.timeline, transport)
    speed = tokens / decoder.seconds if tokens else 0.0
    print(f"\n\n{tokens} tokens decoded, {speed:.1f} a second; ranks: {transport.size}\n")
    costs = expert_costs(session.model)
    print(table(session.model, stored, decoder.position), sent, costs, session.parts.hidden(), sep="\n\n")
    print(f"\n{session.cache.describe()}")
    if session.dense:
        print(f"\nverify: {agreement}")
        if not agreement.holds():
            problems.append(f"tokens or logits differ from the dense decoder's, logits by more than {TOLERANCE:g}")
    if transport.rank == 0:
        for problem in problems:
            complain(problem)
    return int(transport.broadcast(torch.tensor(bool(problems)), root=0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run on this rank; return the exit code: 0, 1 if a check failed, 2 for a mistake of the user's."""
    try:
        transport = open_transport()
    except pikv.PiKVError as error:
        complain(error)
        return 2
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // transport.size))
    with contextlib.ExitStack() as stack:
        stack.enter_context(transport)
        if transport.rank:  # rank 0 prints for all
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        session = on_all_ranks(transport, lambda: Session.prepare(argv, transport))
        return 2 if session is None else run(session, transport)


if __name__ == "__main__":
    sys.exit(main())
