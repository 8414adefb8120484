"""Bytes that ranks send for one decoded token of one layer, by sharding, beside moving pages to the queries.

Ranks are threads here: bytes are counted where they are handed to the transport, and are the same for processes.

    python benchmarks/wire.py --output docs/tables/wire.md
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
from shared import tables
from torch import Tensor

import pikv
from pikv.core.counted_transport import Counted
from pikv.core.ports import Sharding, Transport
from pikv.policies import ExpertGroups, KvHeads, TokenRange, TopK
from pikv.testing.transport import run_ranks

EXPERTS, DECODED = 8, 16
SHAPES = {
    "Mixtral 8x7B": pikv.ModelConfig(
        layers=1, query_heads=32, kv_heads=8, head_dim=128, experts=EXPERTS, experts_per_token=2
    ),
    "the small model": pikv.ModelConfig(
        layers=1, query_heads=4, kv_heads=2, head_dim=32, experts=EXPERTS, experts_per_token=2
    ),
}
SHARDINGS: dict[str, Sharding] = {"kv_heads": KvHeads(), "token_range": TokenRange(), "experts": ExpertGroups()}


@attrs.frozen
class Traffic:
    """Of one rank: the bytes that it sent, and those of the pages and the tail that it stores."""

    sent: int
    stored: int


def traffic(model: pikv.ModelConfig, sharding: Sharding, ranks: int, context: int) -> list[Traffic]:
    """Fill a cache on every rank, decode some tokens, and count; in the order of ranks."""

    def rank(transport: Transport) -> Traffic:
        counted = Counted(transport)
        cache = pikv.compose(model, transport=counted, sharding=sharding, router=TopK())
        generator = torch.Generator().manual_seed(0)
        new_tokens(cache, torch.arange(context), generator)
        cache.finish_prefill()
        for position in range(context, context + DECODED):
            q = new_tokens(cache, torch.tensor([position]), generator)
            cache.attend(0, q)
            cache.route(0, torch.rand(1, 1, EXPERTS, generator=generator))
        stored = cache.stored_bytes()
        return Traffic(sent=counted.sent_bytes, stored=stored.pages + stored.tail)

    return run_ranks(ranks, rank)


def new_tokens(cache: pikv.PiKVCache, positions: Tensor, generator: torch.Generator) -> Tensor:
    """Give a cache random tokens, the same on every rank; those of a prompt are routed too. Returns their queries."""
    layer, count = cache.model.layers[0], len(positions)
    cache.update(0, positions[None], *torch.randn(2, 1, layer.kv_heads, count, layer.key_dim, generator=generator))
    if count > 1:
        cache.route(0, torch.rand(1, count, EXPERTS, generator=generator))
    return torch.randn(1, layer.query_heads, count, layer.key_dim, generator=generator)


def rows(context: int) -> Iterator[list[str]]:
    """One for each shape, number of ranks and sharding; bytes of all ranks together."""
    for (shape, model), ranks, (name, sharding) in itertools.product(SHAPES.items(), (2, 4), SHARDINGS.items()):
        counted = traffic(model, sharding, ranks, context)
        sent = sum(rank.sent for rank in counted) / DECODED
        moved = (ranks - 1) * sum(rank.stored for rank in counted)
        largest = max(rank.stored for rank in counted) / sum(rank.stored for rank in counted)
        yield [shape, str(ranks), f"`{name}`", f"{sent:,.0f}", f"{moved:,}", f"{moved / sent:,.0f}", f"{largest:.0%}"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    parser.add_argument("--context", type=int, default=4096, help="tokens stored before decoding (default: 4096)")
    arguments = parser.parse_args()
    columns = [
        "shape", "ranks", "sharding", "bytes sent a token and layer", "pages moved instead", "ratio", "fullest rank"
    ]  # fmt: skip
    text = f"""# Bytes on the wire

{tables.command()}

One decoded token of one layer, {arguments.context:,} tokens of context in float32, pages of 64 tokens, a tail of 128.
Sent: what all ranks hand to the transport for others, answers and their log-sum-exp, counted over {DECODED} tokens.
Moved instead: the pages and the tail that every rank would have to get from the others to answer by itself, counted
from the storages. Fullest rank: its share of what all store; here experts are drawn at random.

{tables.markdown(columns, rows(arguments.context))}"""
    tables.save(text, arguments.output)


if __name__ == "__main__":
    main()
