"""What moe_decode.py checks: that logits are the dense decoder's, and that each rank stores its own share only."""

from __future__ import annotations

import attrs
import torch
from mixtral import Mixtral
from torch import Tensor

import pikv
from pikv.core.counted_transport import Counted
from pikv.core.ports import HeadSharding, Transport

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


@attrs.define
class Homes:
    """Routes a cache that is sharded by expert, and counts the tokens of each rank: int64 [layers, ranks]."""

    cache: pikv.PiKVCache
    ranks: int
    tokens: Tensor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.tokens = torch.zeros(len(self.cache.model.layers), self.ranks, dtype=torch.int64)

    def route(self, layer_id: int, probabilities: Tensor) -> None:
        """Tell the cache a layer's probabilities [batch, tokens, experts]."""
        home = self.cache.route(layer_id, probabilities).home
        self.tokens[layer_id] += (home % self.ranks).bincount(minlength=self.ranks)


def shares(model: Mixtral, cache: pikv.PiKVCache, tokens: int, homes: Homes | None) -> list[float]:
    """The tokens of each rank's share of `tokens` tokens, in means of all layers and all heads."""
    config, sharding, ranks = model.config, cache.runtime.sharding, model.transport.size
    if homes is not None:
        return homes.tokens.double().mean(0).tolist()
    groups = sharding.head_groups(config.kv_heads, ranks) if isinstance(sharding, HeadSharding) else 1
    owners = sharding.owner(torch.arange(tokens), ranks // groups)
    return [int((owners == rank // groups).sum()) / groups for rank in range(ranks)]


def excesses(
    model: Mixtral, cache: pikv.PiKVCache, stored: list[Stored], tokens: int, homes: Homes | None = None
) -> list[str]:
    """Which ranks store more pages and tail than their share of `tokens` tokens, or other experts than their own.

    A rank's share is the tokens and the heads that the sharding gives it; homes: what it gave by expert. Beyond it
    there is room for a tail, the page that is being filled and one page more.
    """
    config, runtime, ranks = model.config, cache.runtime, len(stored)
    room = runtime.tail_tokens + 2 * runtime.page_size
    token = dense_bytes(model, 1) + config.layers * config.kv_heads * 4  # keys and values, and their positions
    expert = config.layers * 3 * config.hidden * config.intermediate * 4
    found = []
    for rank, (row, share_tokens) in enumerate(zip(stored, shares(model, cache, tokens, homes), strict=True)):
        share = int((share_tokens + room) * token)
        if row.pages + row.tail > share:
            found.append(f"rank {rank} stores {row.pages + row.tail} bytes of pages and tail, its share is {share}")
        experts = len(range(rank, config.experts, ranks)) * expert
        if row.experts != experts:
            found.append(f"rank {rank} holds {row.experts} bytes of experts, its own have {experts}")
    return found


@attrs.define(kw_only=True)
class Wire:
    """What the ranks send: for attention, and for experts and tokens. Counted from `begin` on."""

    attention: Counted
    experts: Counted

    @classmethod
    def over(cls, transport: Transport) -> Wire:
        """Two views of one transport."""
        return cls(attention=Counted(transport), experts=Counted(transport))

    def begin(self) -> None:
        """Count from 0."""
        self.attention.sent_bytes = self.experts.sent_bytes = 0

    def report(self, stored: list[Stored], tokens: int) -> str:
        """Bytes for each of `tokens` decoded tokens, of all ranks together; all ranks call it.

        Beside what it would take to move the pages: every rank then gets what the others store, once a token.
        """
        sent = [self.attention.sent_bytes, self.experts.sent_bytes]
        attention, experts = (self.attention.transport.all_reduce(torch.tensor(sent)) // max(1, tokens)).tolist()
        pages = (len(stored) - 1) * sum(row.pages + row.tail for row in stored)
        return (
            f"Sent a decoded token, in bytes, all ranks together: attention {attention:,}, experts {experts:,}; "
            f"pages moved to the queries would be {pages:,}."
        )


def expert_costs(model: Mixtral) -> str:
    """What the experts of each rank have computed; all ranks call it."""
    mine = torch.tensor([model.computed, model.compute_s], dtype=torch.float64)
    costs = model.transport.all_gather(mine).tolist()
    ranks = (
        f"rank {rank} {tokens:,.0f} in {seconds:.3f} s ({1e3 * seconds / max(1, tokens):.3f} ms each)"
        for rank, (tokens, seconds) in enumerate(costs)
    )
    return f"Tokens of experts: {', '.join(ranks)}."
