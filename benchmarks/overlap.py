"""How much of an exchange between ranks, or of a fetch from slower memory, is hidden where both run together.

Every rank runs this; the ways take turns, so that what disturbs the machine disturbs all. Slower memory is a model: it
waits for as long as its latency and bandwidth say, and computes next to nothing.

    mpirun -n 2 python -m mpi4py benchmarks/overlap.py --output docs/tables/overlap.md
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import torch
from shared import tables
from shared.small_model import MODEL, Mixtral, shape_of
from torch import Tensor
from tqdm import tqdm

import pikv
from pikv.adapters.mpi import MpiTransport
from pikv.core.host_tier import HostTier
from pikv.core.modelled_tier import ModelledTier
from pikv.core.overlap import PREFETCH, Overlap
from pikv.core.ports import Transport
from pikv.core.worker import Background
from pikv.policies import AsThisLayer, FurthestLayer, TokenRange

PAGE_BYTES, PAGES = 1 << 14, 64
EXCHANGES = [(4, 2.0), (4, 8.0), (16, 8.0), (16, 30.0)]  # MiB that a rank sends, ms of the fetch
BATCH, CONTEXT, LAYERS = 256, 160, 4
SHAPE = pikv.ModelConfig(layers=LAYERS, query_heads=32, kv_heads=2, head_dim=128)
FAR_MS, FAR_GB = 4.0, 4.0

Way = Callable[[], object]


def turns(transport: Transport, ways: Mapping[str, Way], rounds: int) -> dict[str, float]:
    """The median milliseconds of each way, of the slower rank; the first rounds are not counted."""
    spans: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(rounds + 3), disable=transport.rank > 0):
        for name, way in ways.items():
            transport.barrier()
            started = time.perf_counter()
            way()
            spans[name].append(1e3 * (time.perf_counter() - started))
    mine = torch.tensor([spans[name][3:] for name in ways], dtype=torch.float64)
    slower = transport.all_gather(mine).amax(0)
    return {name: statistics.median(each.tolist()) for name, each in zip(ways, slower, strict=True)}


def exchange_and_fetch(
    transport: Transport, overlap: Overlap, mebibytes: int, fetch_ms: float, rounds: int
) -> list[str]:
    """A row: an exchange and a fetch, apart, one after the other, and together."""
    sent, out = torch.zeros(mebibytes << 20, dtype=torch.uint8), torch.zeros(PAGES, PAGE_BYTES, dtype=torch.uint8)
    latency_s = fetch_ms * 1e-3 - out.nbytes / 4e9
    keys = torch.arange(PAGES)
    with Background(ModelledTier(HostTier(capacity_bytes=out.nbytes), latency_s=latency_s, bytes_per_s=4e9)) as tier:
        tier.write(keys, out).wait()

        def after() -> None:
            transport.all_gather(sent)
            tier.read(keys, out).wait()

        def beside() -> None:
            tickets = []
            overlap.offer(PREFETCH, lambda: tickets.append(tier.read(keys, out)))
            overlap.all_gather(sent)
            overlap.finish(PREFETCH)
            tickets[0].wait()

        ways = {
            "exchange": lambda: transport.all_gather(sent),
            "fetch": lambda: tier.read(keys, out).wait(),
            "after": after,
            "beside": beside,
        }
        ms = turns(transport, ways, rounds)
    hidden = (ms["after"] - ms["beside"]) / min(ms["exchange"], ms["fetch"])
    return [str(mebibytes), *(f"{ms[name]:.2f}" for name in ways), f"{hidden:.0%}"]


@attrs.define
class Decoding:
    """A cache of random tokens that goes on, one token of every sequence at a time."""

    cache: pikv.PiKVCache
    position: int = 0

    def begin(self) -> None:
        """Take a prompt, which nobody asks about: its answers would take longest to exchange."""
        while self.position < CONTEXT:
            for layer_id in range(LAYERS):
                self.cache.update(layer_id, self.position, *torch.zeros(2, BATCH, 2, 16, 128))
            self.position += 16
        self.cache.finish_prefill()

    def step(self) -> None:
        """Through all layers."""
        for layer_id in range(LAYERS):
            self.cache.update(layer_id, self.position, *torch.zeros(2, BATCH, 2, 1, 128))
            self.cache.attend(layer_id, torch.zeros(BATCH, 32, 1, 128))
        self.position += 1


def decoding(transport: Transport, overlap: Overlap | None, *, far: bool) -> Decoding:
    """With all pages near, or with room near for those of two layers and a few more."""
    store = HostTier(capacity_bytes=1 << 31)
    form = pikv.RuntimeConfig(page_size=16, tail_tokens=16).form(SHAPE, 0)
    a_layer = BATCH * 2 * (CONTEXT // 16) * form.stride // transport.size
    parts = {
        "tiers": [ModelledTier(store, latency_s=FAR_MS * 1e-3, bytes_per_s=FAR_GB * 1e9)],
        "near_bytes": int(2.5 * a_layer),
        "demotion": FurthestLayer(),
        "predictor": None if overlap is None else AsThisLayer(),
        "overlap": overlap,
    }
    cache = pikv.compose(
        SHAPE,
        transport=transport if overlap is None else overlap,
        sharding=TokenRange(tokens=16),
        page_size=16,
        tail_tokens=16,
        **(parts if far else {}),
    )
    decoded = Decoding(cache)
    decoded.begin()
    return decoded


def decode_rows(transport: Transport, overlap: Overlap, rounds: int) -> list[list[str]]:
    """Rows of decoding with and without overlap: pages far; pages near, where there is nothing to hide."""
    rows = []
    for name, far in (("half of the pages far", True), ("all pages near: nothing to fetch", False)):
        ways = {
            "no overlap": decoding(transport, None, far=far).step,
            "overlap": decoding(transport, overlap, far=far).step,
        }
        rows.append(compared(name, turns(transport, ways, rounds), BATCH))
    return rows


def small_model_row(transport: Transport, overlap: Overlap, rounds: int) -> list[str]:
    """The small model, whose collectives are short, so that overlap turns itself off."""
    ways: dict[str, Way] = {}
    for name, over in (("no overlap", transport), ("overlap", overlap)):
        model = Mixtral(MODEL, over)
        cache = pikv.compose(shape_of(model), transport=over)
        prompt, position = torch.arange(500)[None] % 100, [500]
        model.step(prompt, 0, cache)

        def step(model: Mixtral = model, cache: pikv.PiKVCache = cache, position: list[int] = position) -> Tensor:
            position[0] += 1
            return model.step(torch.tensor([[7]]), position[0] - 1, cache)

        ways[name] = step
    return compared("the small model, batch 1", turns(transport, ways, 5 * rounds), 1)


def compared(name: str, ms: Mapping[str, float], batch: int) -> list[str]:
    """A row of two ways to decode."""
    rates = [1e3 * batch / ms[way] for way in ("no overlap", "overlap")]
    return [name, *(f"{rate:,.0f}" for rate in rates), f"{rates[1] / rates[0] - 1:+.1%}"]


def main() -> None:
    """The command line of every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    parser.add_argument("--rounds", type=int, default=15, help="of each way, timed (default: 15)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transport = MpiTransport()
    with Overlap(transport) as overlap:
        exchanges = [exchange_and_fetch(transport, overlap, *each, arguments.rounds) for each in EXCHANGES]
        decoded = decode_rows(transport, overlap, arguments.rounds)
        decoded.append(small_model_row(transport, overlap, arguments.rounds))
        text = table(exchanges, decoded, transport.size)
        if transport.rank == 0:
            tables.save(text, arguments.output)


def table(exchanges: list[list[str]], decoded: list[list[str]], ranks: int) -> str:
    """Both tables."""
    sent = BATCH * 32 * 129 * 4 / 2**20
    return f"""# Overlap

    mpirun -n {ranks} {tables.command().strip()}

{tables.machine()}; {ranks} ranks on one machine, MPICH. Medians in ms, of the slower rank; the ways take turns.

An exchange (all_gather, so many MiB from each rank) and a fetch of {PAGES} pages from far memory, which is a model: it
waits, by the clock. Hidden: what is saved against one after the other, a share of the lesser of the two.

{tables.markdown(["MiB", "exchange", "fetch", "one after the other", "together", "hidden"], exchanges)}
Decoding, tokens a second: {LAYERS} layers, 32 query heads, 2 KV heads of 128, {BATCH} sequences of {CONTEXT} tokens
and more, by token range, so that a rank sends {sent:.1f} MiB a layer. Far memory, a model: {FAR_MS:.0f} ms and
{FAR_GB:.0f} GB/s a batch; near memory holds the pages of two and a half of the four layers. Without overlap pages are
fetched when they are needed.

{tables.markdown(["decoding", "no overlap", "overlap", "gained"], decoded)}"""


if __name__ == "__main__":
    main()
