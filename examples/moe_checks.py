"""What moe_decode.py checks: that logits are the dense decoder's, and that each rank stores its own share only."""

from __future__ import annotations

import attrs
import torch
from mixtral import Mixtral
from torch import Tensor

import pikv
from pikv.core.ports import HeadSharding

TOLERANCE = 1e-4  # of logits; and dense logits closer than this are a tie


@attrs.define
class Agreement:
    """How far logits are from the dense decoder's, step by step."""

    steps: int = 0
    agreed: int = 0
    largest_difference: float = 0.0

    def add(self, logits: Tensor, dense: Tensor) -> None:
        """Compare one step's logits [vocabulary]. Tokens agree when they are equal, or the dense top two tie."""
        first, second = dense.topk(2).values.tolist()
        self.steps += 1
        self.agreed += bool(logits.argmax() == dense.argmax()) or first - second < TOLERANCE
        self.largest_difference = max(self.largest_difference, float((logits - dense).abs().max()))

    def holds(self) -> bool:
        """Whether all tokens agree and all logits are within the tolerance."""
        return self.agreed == self.steps and self.largest_difference <= TOLERANCE

    def __str__(self) -> str:
        return (
            f"{self.agreed} of {self.steps} tokens agree with the dense decoder, "
            f"largest difference of logits {self.largest_difference:.2e}"
        )


@attrs.frozen
class Stored:
    """The bytes that one rank stores: of sealed pages, of the tail, of the whole cache, and of experts."""

    pages: int
    tail: int
    cache: int
    experts: int

    @classmethod
    def everywhere(cls, model: Mixtral, cache: pikv.PiKVCache) -> list[Stored]:
        """Read this rank's storages and gather those of all, in the order of ranks."""
        stored = cache.stored_bytes()
        mine = [stored.pages, stored.tail, stored.total, model.expert_bytes()]
        return [cls(*row) for row in model.transport.all_gather(torch.tensor(mine)).tolist()]


def dense_bytes(model: Mixtral, tokens: int) -> int:
    """The bytes of the keys and values of `tokens` tokens, all of them stored in float32."""
    return tokens * model.config.layers * model.config.kv_heads * 2 * model.config.head_dim * 4


def table(model: Mixtral, stored: list[Stored], tokens: int) -> str:
    """One line a rank: what it stores, in bytes and in parts of a dense cache of `tokens` tokens."""
    dense = dense_bytes(model, tokens)
    rows = ["rank        pages         tail  whole cache  of dense      experts"]
    rows += [
        f"{rank:>4} {row.pages:>12,} {row.tail:>12,} {row.cache:>12,} {row.cache / dense:>9.1%} {row.experts:>12,}"
        for rank, row in enumerate(stored)
    ]
    return "\n".join([*rows, f"In bytes; a dense cache of the {tokens:,} tokens has {dense:,}, on every rank."])


def excesses(model: Mixtral, cache: pikv.PiKVCache, stored: list[Stored], tokens: int) -> list[str]:
    """Which ranks store more pages and tail than their share of `tokens` tokens, or other experts than their own.

    A rank's share is the tokens and the heads that the sharding gives it. Beyond it there is room for a tail, the page
    that is being filled and one page more.
    """
    config, runtime, ranks = model.config, cache.runtime, len(stored)
    groups = 1  # of heads
    if isinstance(runtime.sharding, HeadSharding):
        groups = runtime.sharding.head_groups(config.kv_heads, ranks)
    owners = runtime.sharding.owner(torch.arange(tokens), ranks // groups)
    room = runtime.tail_tokens + 2 * runtime.page_size
    token = dense_bytes(model, 1) + config.layers * config.kv_heads * 4  # keys and values, and their positions
    expert = config.layers * 3 * config.hidden * config.intermediate * 4
    found = []
    for rank, row in enumerate(stored):
        share = (int((owners == rank // groups).sum()) + room) * token // groups
        if row.pages + row.tail > share:
            found.append(f"rank {rank} stores {row.pages + row.tail} bytes of pages and tail, its share is {share}")
        experts = len(range(rank, config.experts, ranks)) * expert
        if row.experts != experts:
            found.append(f"rank {rank} holds {row.experts} bytes of experts, its own have {experts}")
    return found
