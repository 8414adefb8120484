"""What a model and a composition come to on stated machines: bytes, what fits, milliseconds, bytes on the wire."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from pikv.compose import runtime_from
from pikv.compositions import Composition, full_bytes
from pikv.core.config import ModelConfig
from pikv.core.validators import optional_positive, positive
from pikv.planning.shapes import Shape
from pikv.planning.stored import CachePlan

MOST_TOKENS = 1 << 26
"""The longest context that is looked at in search of the longest that fits."""

_stated = attrs.validators.optional(attrs.validators.gt(0))


@attrs.frozen(kw_only=True)
class Machines:
    """What there is to run on, as stated by who asks; None where nothing was said.

    ranks: equal machines that share weights and caches evenly. memory_bytes, memory_bandwidth (bytes a second) and
    flops (operations a second): of each. link: bytes a second between ranks, or from where caches are stored.
    weight_bits: of a parameter.
    """

    ranks: int = attrs.field(default=1, validator=positive)
    weight_bits: float = attrs.field(default=16.0, validator=attrs.validators.gt(0))
    memory_bytes: int | None = attrs.field(default=None, validator=optional_positive)
    memory_bandwidth: float | None = attrs.field(default=None, validator=_stated)
    link: float | None = attrs.field(default=None, validator=_stated)
    flops: float | None = attrs.field(default=None, validator=_stated)

    def weight_bytes(self, parameters: float) -> float:
        """Of so many parameters, on one rank."""
        return parameters * self.weight_bits / 8 / self.ranks


@attrs.frozen(kw_only=True)
class Workload:
    """A model's cache to plan: `batch` sequences of so many tokens. model: how shape's attention is cached."""

    shape: Shape
    model: ModelConfig
    machines: Machines
    tokens: int = attrs.field(validator=positive)
    batch: int = attrs.field(validator=positive)

    def cache(self, composition: Composition, *, tokens: int | None = None, batch: int | None = None) -> CachePlan:
        """The plan of a composition's cache, on all ranks together."""
        tokens = self.tokens if tokens is None else tokens
        runtime = runtime_from(composition.names_for(self.model, tokens), self.model)
        return CachePlan.of(self.model, runtime, tokens=tokens, batch=self.batch if batch is None else batch)


@attrs.frozen(kw_only=True)
class PlanRow:
    """One composition; bytes are of one rank, those by layer of all.

    cache_bytes: as `stored_bytes` counts. share: of a cache that is just keys and values. most_sequences,
    longest_context: what fits beside the weights, the rest as it is; 0 where not even one does, None without a stated
    memory. token_ms: to read weights and cache once, cache_ms: the cache's part. fetch_ms: to bring one sequence's
    cache over the link, recompute_ms: to compute its prompt anew: the one or the other, by the smaller (Mooncake, arXiv
    2407.00079, section 5). None where a rate was not stated.
    """

    composition: str
    cache_bytes: float
    share: float
    layer_bytes: tuple[int, ...]
    most_sequences: int | None
    longest_context: int | None
    token_ms: float | None
    cache_ms: float | None
    fetch_ms: float | None
    recompute_ms: float | None


def plan(work: Workload, composition: Composition) -> PlanRow:
    """One row. Raises ConfigError for a composition that cannot work."""
    machines, cache, one = work.machines, work.cache(composition), work.cache(composition, batch=1)
    weights = machines.weight_bytes(work.shape.read_parameters(work.batch))
    read = sum(cache.read_bytes) / machines.ranks
    return PlanRow(
        composition=composition.text,
        cache_bytes=cache.total / machines.ranks,
        share=cache.total / (work.batch * full_bytes(work.model, work.tokens)),
        layer_bytes=tuple(layer.total for layer in cache.stored),
        most_sequences=None if (free := _free(work)) is None else max(0, int(free // one.total)),
        longest_context=None if free is None else _longest(work, composition, free),
        token_ms=_ms(weights + read, machines.memory_bandwidth),
        cache_ms=_ms(read, machines.memory_bandwidth),
        fetch_ms=_ms(one.total, machines.link),
        recompute_ms=_ms(prompt_operations(work.shape, work.tokens) / machines.ranks, machines.flops),
    )


def prompt_operations(shape: Shape, tokens: int) -> int:
    """Multiplications and additions to read a prompt: two a parameter and token, and causal attention, expanded."""
    attention = 0
    for layer in (shape.expanded or shape.model).layers:
        window = tokens if layer.window is None else min(tokens, layer.window)
        pairs = tokens * window - window * (window - 1) // 2  # query and key
        attention += 2 * layer.query_heads * (layer.key_dim + layer.value_dim) * pairs
    return int(2 * shape.active_parameters * tokens) + attention


@attrs.frozen(kw_only=True)
class Wire:
    """Bytes that cross between ranks for one step of the batch, however the cache is written.

    experts: tokens sent to the ranks of their experts, and back. queries: queries sent to every rank's pages, and
    answers with their log-sum-exp back. pages: what would cross instead if pages went to the queries.
    """

    experts: float
    queries: float
    pages: float


def wire(work: Workload, composition: Composition) -> Wire:
    """For a cache that is spread evenly over the ranks."""
    others, itemsize, model = work.machines.ranks - 1, work.model.dtype.itemsize, work.model
    remote = others / work.machines.ranks
    hops = 2 * work.shape.hidden * itemsize * (model.experts_per_token or 0) * work.shape.weights.expert_layers
    queries = sum(
        layer.query_heads * ((layer.key_dim + layer.value_dim) * itemsize + 4)  # and a float32 log-sum-exp
        for layer in model.layers
    )
    return Wire(
        experts=work.batch * hops * remote,
        queries=work.batch * queries * others,
        pages=sum(work.cache(composition).read_bytes) * remote,
    )


def _free(work: Workload) -> float | None:
    """The memory of all ranks that weights leave to caches."""
    machines = work.machines
    if machines.memory_bytes is None:
        return None
    return machines.ranks * (machines.memory_bytes - machines.weight_bytes(work.shape.parameters))


def _longest(work: Workload, composition: Composition, free: float) -> int:
    """Of all sequences alike; MOST_TOKENS where even that fits."""

    def fits(tokens: int) -> bool:
        return work.cache(composition, tokens=tokens).total <= free

    return _last(fits, MOST_TOKENS)


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The greatest number up to `most` for which something holds that holds for all smaller ones; 0 if for none."""
    low, high = 0, most + 1
    while high - low > max(1, low // 1000):  # to a thousandth: bytes step by pages
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _ms(amount: float, rate: float | None) -> float | None:
    return None if rate is None else 1e3 * amount / rate
