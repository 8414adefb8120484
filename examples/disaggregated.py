"""A prompt is computed in one process and answered in another, which reads its pages while they are still being made.

    python examples/disaggregated.py

The pages go through a folder, or an S3 bucket (--endpoint, --bucket, and the keys where S3 clients look for them). The
model is random, so this shows what is computed when, not what is answered. Each process has one thread. It needs
pikv[transformers,zarr].
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import attrs
import torch
import transformers
from prefix_sharing import VOCABULARY, random_model
from torch import Tensor

import pikv
from pikv.adapters.transformers import Host, HostCache, attach
from pikv.adapters.zarr_store import StoredPrefixes
from pikv.core.ports import PrefixStore

WAIT_S = 120.0  # for a layer's pages
NOW = time.monotonic  # the system's, the same in all processes


@attrs.define(eq=False)
class Watched(PrefixStore):
    """A store that notes when each layer was last given to it, first needed from it, and last got from it."""

    store: PrefixStore
    given: dict[int, float] = attrs.field(factory=dict)
    needed: dict[int, float] = attrs.field(factory=dict)
    got: dict[int, float] = attrs.field(factory=dict)

    def write(self, names: Sequence[str], pages: Tensor) -> None:
        self.given[_layer_of(names[0])] = NOW()
        self.store.write(names, pages)

    def flush(self) -> None:
        self.store.flush()

    def contains(self, names: Sequence[str]) -> Tensor:
        self.needed.setdefault(_layer_of(names[0]), NOW())
        return self.store.contains(names)

    def read(self, names: Sequence[str], out: Tensor) -> Tensor:
        there = self.store.read(names, out)
        if bool(there.any()):
            self.got[_layer_of(names[0])] = NOW()
        return there

    def close(self) -> None:
        self.store.close()


def _layer_of(name: str) -> int:
    return int(name.rpartition(".")[2])


@attrs.frozen(kw_only=True)
class Said:
    """What a process answered: the tokens, when it began and when the first one was there, and what its store saw."""

    tokens: list[int]
    began: float
    first: float
    given: dict[int, float] = attrs.field(factory=dict)
    needed: dict[int, float] = attrs.field(factory=dict)
    got: dict[int, float] = attrs.field(factory=dict)


class _Times:
    """What generate tells each token to, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(NOW())

    def end(self) -> None:
        pass


def say(model: transformers.PreTrainedModel, cache: HostCache, ids: Tensor, tokens: int) -> Said:
    """The first tokens of an answer, greedy."""
    began, times = NOW(), _Times()
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        streamer=times,
    )
    return Said(tokens=said[0, ids.shape[1] :].tolist(), began=began, first=times.times[1])


def serve(connection: Connection, place: Callable[[], Any], prompt_tokens: int) -> None:
    """A process: do what the connection asks for, each time with an empty pool, until it asks for nothing."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = random_model(prompt_tokens + 64)
    with StoredPrefixes(place()) as store:
        while (asked := connection.recv()) is not None:
            role, ids, tokens = asked
            watched = Watched(store)
            with attach(model, pikv.RuntimeConfig(prefix_store=watched)) as host:
                said = say(model, CACHES[role](host), torch.tensor([ids]), tokens)
                store.flush()
            seen = {name: getattr(watched, name) for name in ("given", "needed", "got")}
            connection.send(attrs.evolve(said, **seen))


def _pool(host: Host) -> pikv.PagePool:
    return pikv.PagePool(host.model, host.runtime)


CACHES: dict[str, Callable[[Host], HostCache]] = {
    "alone": lambda host: host.new_cache(),
    "prefill": lambda host: host.new_cache(prefix_from=_pool(host)),
    "decode": lambda host: host.new_cache(prefix_from=_pool(host), wait_s=WAIT_S),
}


@attrs.frozen
class Process:
    """Another process that serves, and the connection to it."""

    process: multiprocessing.process.BaseProcess
    connection: Connection

    @classmethod
    def start(cls, *arguments: Any) -> Process:
        """An interpreter of its own: a fork would share torch's threads."""
        context = multiprocessing.get_context("spawn")
        mine, others = context.Pipe()
        process = context.Process(target=serve, args=(others, *arguments), daemon=True)
        process.start()
        others.close()
        return cls(process, mine)

    def stop(self) -> None:
        """Let it end."""
        self.connection.send(None)
        self.process.join()
        self.connection.close()


def folder_or_bucket(folder: str, endpoint: str | None, bucket: str) -> Any:
    """What StoredPrefixes opens."""
    if endpoint is None:
        return folder
    from obstore.store import S3Store

    return S3Store(bucket, endpoint=endpoint, client_options={"allow_http": True}, virtual_hosted_style_request=False)


@attrs.frozen
class Round:
    """One prompt, answered in one process and then by two. prefill: of the two, the one that computed the prompt."""

    alone: Said
    prefill: Said
    decode: Said

    @property
    def began(self) -> float:
        """When the prompt came to the first of the two."""
        return min(self.prefill.began, self.decode.began)

    @property
    def transfers_s(self) -> list[float]:
        """Of each layer, from the moment in which its last page was sealed until the other process had it."""
        return [self.decode.got[layer] - self.prefill.given[layer] for layer in sorted(self.decode.got)]

    @property
    def exposed_s(self) -> float:
        """How long the last layer was waited for though it was sealed: by this the transfers delay the first token."""
        last = max(self.decode.got)
        return max(0.0, self.decode.got[last] - max(self.decode.needed[last], self.prefill.given[last]))

    def timeline(self) -> str:
        """When what happened, in ms since the prompt came."""
        events = [(self.prefill.first, "prefill: it has the first token too, and is done")]
        events += [(self.decode.first, "decode:  first token")]
        for layer, given in self.prefill.given.items():
            events.append((given, f"prefill: layer {layer} is sealed and on its way"))
            events.append((self.decode.needed[layer], f"decode:  layer {layer} is needed"))
            events.append((self.decode.got[layer], f"decode:  layer {layer} is here"))
        return "\n".join(f"{1e3 * (at - self.began):9.1f} ms  {what}" for at, what in sorted(events))


def main() -> None:
    """Answer prompts in one process, then in two, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="300 or more, so that there are pages to send")
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--endpoint", help="of an S3 service; a folder that is deleted again if it is left out")
    parser.add_argument("--bucket", default="prefixes")
    arguments = parser.parse_args()
    if arguments.prompt_tokens < 300 or arguments.answer_tokens < 1 or arguments.rounds < 1:
        parser.error("--prompt-tokens must be 300 or more, --answer-tokens and --rounds 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        rounds = measured(arguments, folder)
    print(rounds[-1].timeline())
    alone = statistics.median(each.alone.first - each.alone.began for each in rounds)
    two = statistics.median(each.decode.first - each.began for each in rounds)
    print(f"first token: {alone:.3f} s in one process, {two:.3f} s in two ({two / alone:.2f}x)")
    transfers = statistics.median(sum(each.transfers_s) for each in rounds)
    exposed = statistics.median(each.exposed_s for each in rounds)
    print(
        f"transfer: {1e3 * transfers:.1f} ms in all layers, {1e3 * exposed:.1f} ms of it delay the first token, "
        f"{1 - exposed / transfers:.0%} are hidden"
    )


def measured(arguments: argparse.Namespace, folder: str) -> list[Round]:
    """The rounds after a first one, in which kernels are compiled."""
    place = functools.partial(folder_or_bucket, folder, arguments.endpoint, arguments.bucket)
    prefill, decode = (Process.start(place, arguments.prompt_tokens) for _ in range(2))
    generator, rounds = torch.Generator().manual_seed(0), list[Round]()
    for _ in range(1 + arguments.rounds):
        ids = torch.randint(1, VOCABULARY, (arguments.prompt_tokens,), generator=generator).tolist()
        prefill.connection.send(("alone", ids, arguments.answer_tokens))
        alone = prefill.connection.recv()
        prefill.connection.send(("prefill", ids, 1))
        decode.connection.send(("decode", ids, arguments.answer_tokens))
        rounds.append(Round(alone, prefill.connection.recv(), decode.connection.recv()))
        if rounds[-1].decode.tokens != alone.tokens:
            raise RuntimeError(f"two processes said {rounds[-1].decode.tokens}, one {alone.tokens}")
    for process in (prefill, decode):
        process.stop()
    print(f"{arguments.rounds} prompts of {arguments.prompt_tokens} tokens; two processes say what one says")
    return rounds[1:]


if __name__ == "__main__":
    main()
