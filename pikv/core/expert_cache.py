"""ExpertKVCache: keys and values in shards by expert, each bounded by itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core import attention, checks, layers, reading, routing, showing
from pikv.core.attention import Partial
from pikv.core.config import ModelConfig
from pikv.core.errors import ConfigError, InputError, StateError
from pikv.core.layer import PADDING, LayerCache
from pikv.core.modes import keeps_numbers
from pikv.core.page_reads import ReadCounter
from pikv.core.places import Places
from pikv.core.pool import PagePool
from pikv.core.ports.router import Routing
from pikv.core.reports import StoredBytes
from pikv.core.runtime import RuntimeConfig
from pikv.core.serving import serve
from pikv.core.settler import Settler
from pikv.core.views import ContextKV


@final
class ExpertKVCache:
    """The keys and values of a batch of sequences: in every layer, each token in the shard of its best expert.

    Experts share `shards` shards, expert e in shard e mod shards. A shard is bounded by itself: budget_tokens is the
    mean number of tokens that a layer and KV head keep in each, and the token selector says which (`Recent(sinks=0)`:
    the newest). Attention over any set of shards is merged by log-sum-exp, which is as attention over their union.
    Source: the ExpertKVCache of PiKV, arXiv 2508.06526. Made of the same pages and tails as PiKVCache; rows are (layer,
    sequence, KV head, shard).

    In each layer `update`, `attend`, then `route`: a token waits outside of the shards until it is routed, and is seen
    meanwhile. One batch and one thread. An operation that raises leaves the cache as it was.
    """

    def __init__(
        self, model: ModelConfig, runtime: RuntimeConfig, *, shards: int, pool: PagePool | None = None
    ) -> None:
        _check(model, runtime, shards)
        self.model, self.runtime, self.shards = model, runtime, shards
        self.pool = PagePool(model, runtime) if pool is None else pool
        runtime.check_serves(model)
        self._served = serve(model, runtime)
        for served in self._served:
            self.pool.check_serves(served.codec, runtime.page_selector)
        self._layers: dict[int, LayerCache] = {}
        self._settler = Settler.of(Places.of(model, runtime), runtime, self.pool, self._served, self._layers)
        self._reads = ReadCounter(runtime.page_selector)
        self._waiting: dict[int, tuple[Tensor, Tensor]] = {}
        self._prefilling = True
        weakref.finalize(self, layers.abandon, self._layers)

    @keeps_numbers
    def update(self, layer_id: int, token_id: int | Tensor, k: Tensor, v: Tensor | None) -> None:
        """Store the keys and values of new tokens; arguments and errors are those of PiKVCache.update.

        Raises StateError too if the layer's last update was not routed.
        """
        k, v = checks.new_tokens(self.model, layer_id, k, v)
        positions = checks.positions(token_id, k.shape[0], k.shape[2])
        if self._layers and len(k) != self.sequences:
            raise InputError(f"k must have batch = {self.sequences}, the sequences of this cache, got {len(k)}")
        keys, values, placed = self._to_rows(k), self._to_rows(v), self._to_rows(positions)
        codec, held = self._served[layer_id].codec, self._layers.get(layer_id)
        layer = LayerCache.empty(layer_id, codec, self.pool, keys) if held is None else held
        checks.increasing(layer, placed)
        self._check_routed(layer_id)
        if k.shape[2] == 1:
            self.finish_prefill()
        self._prefilling |= k.shape[2] >= self.runtime.page_size
        arriving = torch.arange(len(placed)) % (self.shards + 1) == 0
        layer.append(keys, values, placed, placed.masked_fill(~arriving[:, None], -1))
        self._layers[layer_id], self._waiting[layer_id] = layer, (keys, values)

    @keeps_numbers
    def attend(self, layer_id: int, q: Tensor, *, shards: Iterable[int] | None = None) -> Tensor:
        """Attention of the last update's tokens, over these shards, by default all, and over each other.

        q [batch, query_heads, tokens, key_dim], of that update's tokens; returns [batch, query_heads, tokens,
        value_dim] in q's dtype. May be asked again, for other shards, until the tokens are routed.

        Raises InputError; StateError before any update, or after `route` where there were several tokens.
        """
        layer = self._read_layer(layer_id)
        if q.dim() != 4 or len(q) != self.sequences:
            raise InputError(f"q must be [batch, ...] with batch = {self.sequences}, got {list(q.shape)}")
        chosen = self._numbers(shards)
        rows = self._to_rows(q)
        checks.queries(self.model, layer, rows)
        partial = reading.with_sinks(layer.config, self._attended(layer, rows, chosen))
        showing.ask(layer, rows, self.runtime.query_window, None)
        output = partial.output.flatten(1, 2).to(q.dtype)
        nowhere = layer.queried[:: self.shards + 1] == PADDING
        return output.masked_fill(nowhere[:, None, :, None].to(output.device), 0)

    def _attended(self, layer: LayerCache, rows: Tensor, shards: list[int]) -> Partial:
        """Over what arrives and these shards: [batch, kv_heads, group, tokens, ...]."""
        grouped = rows.unflatten(1, (layer.config.kv_heads, layer.config.group))
        parts = reading.attend(layer, self._served[layer.layer_id], grouped, layer.asked_from(), self._reads)
        outputs, logs = (states.unflatten(0, (-1, self.shards + 1)) for states in (parts.output, parts.log_sum_exp))
        return attention.merge([Partial(outputs[:, row], logs[:, row]) for row in (0, *(s + 1 for s in shards))])

    @keeps_numbers
    def route(self, layer_id: int, probabilities: Tensor) -> Routing:
        """Put the last update's tokens into the shards of their best experts, then evict and seal.

        probabilities [batch, tokens, experts], of the model's own gate, known after the layer's attention. Returns the
        router's choice. Raises InputError; StateError before any update; PoolFullError if settling finds no room: the
        tokens are in their shards then, and another `route`, or the next `update`, settles the layer.
        """
        layer = self._read_layer(layer_id)
        batch, tokens = self.sequences, layer.queried.shape[1]
        chosen = routing.choose(self.model, self.runtime, probabilities, batch=batch, tokens=tokens)
        if layer_id in self._waiting:
            home = (chosen.home.cpu() % self.shards).view(batch, 1, tokens)
            row = torch.arange(-1, self.shards)[:, None]  # the first is of what arrives, and becomes empty
            there = (home == row).flatten(0, 1)
            layer.rehome(*self._waiting[layer_id], layer.queried.masked_fill(~there, -1))
            del self._waiting[layer_id]
        self._settle([layer])
        return chosen

    @keeps_numbers
    def finish_prefill(self) -> None:
        """Settle what the prompt left, as PiKVCache.finish_prefill; every layer's tokens must have been routed."""
        if self._prefilling:
            for layer_id in self._layers:
                self._check_routed(layer_id)
            self._prefilling = False
            try:
                self._settle(self._layers.values())
            except BaseException:
                self._prefilling = True
                raise

    def _settle(self, unsettled: Iterable[LayerCache]) -> None:
        self._settler.carry_out(self._settler.decide(unsettled, prefilling=self._prefilling))
        self._settler.finish(unsettled, prefilling=self._prefilling)

    @property
    def sequences(self) -> int:
        """The batch: how many sequences the cache holds; 0 before the first update."""
        return next(iter(self._layers.values())).sequences // (self.shards + 1) if self._layers else 0

    def retrieve(self, layer_id: int, shard: int) -> ContextKV:
        """The tokens of one shard of a layer, decoded, oldest first. Those that wait to be routed are in none."""
        (number,) = self._numbers([shard])
        whole = attrs.asdict(showing.context(self._read_layer(layer_id)), recurse=False)
        return ContextKV(**{name: states[number + 1 :: self.shards + 1] for name, states in whole.items()})

    def stored_bytes(self) -> StoredBytes:
        """The bytes that this cache holds, read from its storages."""
        return StoredBytes.of(self._layers.values())

    def reset(self) -> None:
        """Forget everything; the next update may bring another batch."""
        layers.release(self._layers)
        self._layers.clear()
        self._waiting.clear()
        self._reads, self._prefilling = ReadCounter(self.runtime.page_selector), True

    def _to_rows(self, states: Tensor) -> Tensor:
        """States [batch, ...] for what arrives and for every shard: [batch * (1 + shards), ...]."""
        return states[:, None].expand(-1, self.shards + 1, *states.shape[1:]).flatten(0, 1)

    def _numbers(self, shards: Iterable[int] | None) -> list[int]:
        chosen = list(range(self.shards)) if shards is None else sorted(set(shards))
        if chosen and not (chosen[0] >= 0 and chosen[-1] < self.shards):
            raise InputError(f"shards must be between 0 and {self.shards - 1}, got {chosen}")
        return chosen

    def _read_layer(self, layer_id: int) -> LayerCache:
        checks.layer(self.model, layer_id)
        if layer_id not in self._layers:
            raise StateError(f"layer {layer_id} is empty: there is nothing to read; call update first")
        return self._layers[layer_id]

    def _check_routed(self, layer_id: int) -> None:
        if layer_id in self._waiting:
            raise StateError(
                f"layer {layer_id}: its last update waits to be routed, which says what shards it belongs to; call "
                f"route({layer_id}, probabilities) after attend"
            )


def _check(model: ModelConfig, runtime: RuntimeConfig, shards: int) -> None:
    routing.check(model, runtime)
    assert model.experts is not None  # routing.check has said so
    if not 1 <= shards <= model.experts:
        raise ConfigError(f"shards must be between 1 and experts = {model.experts}, got {shards}; experts share shards")
    if runtime.transport is not None:
        raise ConfigError(
            "ExpertKVCache has all shards on one rank; over ranks a PiKVCache is sharded by ExpertGroups()"
        )
    if runtime.predictor is not None:
        raise ConfigError("ExpertKVCache reads all of its shards' pages and foresees none; leave the predictor out")
    if runtime.remembers is not None:
        raise ConfigError(
            f"{type(runtime.remembers).__name__} remembers what a token was attended before it had a shard; compose "
            "another token selector (Recent)"
        )
    if runtime.shares_layers(model):
        raise ConfigError(
            f"{type(runtime.token_selector).__name__} has layers keep what others keep, and a shard holds other tokens "
            "of each layer; let each layer choose for itself"
        )
