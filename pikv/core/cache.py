"""PiKVCache: the pipeline of a cache for one batch of sequences."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

import torch
from torch import Tensor

from pikv.core import adopting, checkpoint, checks, layers, pinning, reading, restoring, routing, settling, showing
from pikv.core.arrivals import Arrivals
from pikv.core.config import ModelConfig
from pikv.core.errors import ConfigError, InputError, StateError
from pikv.core.layer import LayerCache
from pikv.core.lineage import Lineage, why_unshared
from pikv.core.modes import keeps_numbers
from pikv.core.page_reads import PageReads, ReadCounter
from pikv.core.places import Places
from pikv.core.pool import PagePool
from pikv.core.ports.router import Routing
from pikv.core.ports.streamer import Version
from pikv.core.prefetch import Foresight, Prefetcher
from pikv.core.promised import Promised
from pikv.core.rehearsal import Rehearsal
from pikv.core.reports import Description, StoredBytes
from pikv.core.runtime import RuntimeConfig
from pikv.core.serving import describe, serve
from pikv.core.settler import Settler
from pikv.core.views import ContextKV, TokenView

_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class PiKVCache:
    """The keys and values of a batch of sequences, in every layer of a model.

    One batch and one thread; several caches may share a pool. In each layer, `update` takes new tokens, `attend`
    reads what is stored, and then the layer is settled: it evicts to its budget and seals full pages. A host with
    an attention of its own calls `retrieve` instead; its layers settle at their next `update`.

    An operation that raises leaves the cache as it was.
    """

    def __init__(
        self, model: ModelConfig, runtime: RuntimeConfig | None = None, *, pool: PagePool | None = None
    ) -> None:
        self.model = model
        self.runtime = RuntimeConfig() if runtime is None else runtime
        self.pool = PagePool(model, self.runtime) if pool is None else pool
        if self.pool.device != model.device:
            raise ConfigError(f"pool must be on {model.device} like the model, got one on {self.pool.device}")
        self.runtime.check_serves(model)
        self._query_windows = [self.runtime.query_window_of(layer_id) for layer_id in range(len(model.layers))]
        self._places = Places.of(model, self.runtime)
        self._served = serve(self._places.stored_model(), self.runtime)
        for served in self._served:
            self.pool.check_serves(served.codec, self.runtime.page_selector)
        self._layers: dict[int, LayerCache] = {}
        self._settler = Settler.of(self._places, self.runtime, self.pool, self._served, self._layers)
        self._arrivals = Arrivals(self._places)
        self._rehearsal = Rehearsal(selector=self.runtime.remembers, layers=self._layers)
        self._reads = ReadCounter(self.runtime.page_selector)
        self._prefetcher = Prefetcher.of(self.runtime.predictor, self._layers, self.runtime.overlap)
        self._prefilling = True
        self._lineage: Lineage | None = None
        self._promised: Promised | None = None
        weakref.finalize(self, layers.abandon, self._layers)

    # --- writing and reading

    @keeps_numbers
    def begin(
        self, token_ids: Tensor, *, chunk_tokens: int | None = None, weights: str = "", wait_s: float | None = None
    ) -> Tensor:
        """Adopt what the pool knows of these prompts; returns how many tokens need no computing: int64 [batch].

        token_ids [batch, tokens], below 0 for padding, the tokens of a sequence standing from position 0 on. `update`
        goes on at the position returned; full pages of these tokens become known as they are sealed. chunk_tokens: the
        updates that the prompts would come in, one by default; it matters where pages are read with a loss. weights:
        names the model's weights, and adapters, in a pool that others with the same config share. Where pages depend
        on more than the tokens, it returns 0 and `why_unshared` says why.

        wait_s: another process is computing these prompts and writes their pages to the prefix_store. All pages then
        count as known, and the first `update` of a layer waits for those of that layer, at most so many seconds: it
        raises WaitTimeoutError, which names the page, and may be called again.

        Raises InputError for another shape or type; StateError unless the cache is empty.
        """
        if self._layers:
            raise StateError("begin comes before the first update, and this cache holds tokens; reset it or make one")
        prompts = adopting.Prompts.of(token_ids, chunk_tokens=chunk_tokens, weights=weights, wait_s=wait_s)
        if self.why_unshared is not None:
            self._lineage = self._promised = None
            return torch.zeros(len(prompts.tokens), dtype=torch.int64)
        begun = adopting.begin(self.model, self.runtime, self.pool, self._served, prompts)
        self._lineage, self._promised = begun.lineage, begun.promised
        self._layers.update(begun.layers)
        return self._lineage.covered()

    @property
    def why_unshared(self) -> str | None:
        """Why `begin` adopts nothing in this composition; None where it may."""
        return why_unshared(self.model, self.runtime)

    @keeps_numbers
    def update(self, layer_id: int, token_id: int | Tensor, k: Tensor, v: Tensor | None) -> None:
        """Store the keys and values of new tokens.

        k [batch, kv_heads, tokens, key_dim], v [..., value_dim], after any rotary embedding; or [kv_heads, dim] for
        one token of one sequence. v: None in a layer whose values are a key_prefix. token_id: the position of the first
        token, or positions [batch, tokens], which increase along a sequence and may jump. Padding is not stored: -1, or
        -2 - p for padding that stands at position p, not before what is stored, and whose query sees what a token there
        would see.

        Raises InputError for a wrong shape, dtype, device or position, and for NaN on the CPU; LayerError; and what
        `begin` with wait_s says.
        """
        k, v = checks.new_tokens(self.model, layer_id, k, v)
        positions = checks.positions(token_id, k.shape[0], k.shape[2])
        if self._layers:
            checks.same_batch(next(iter(self._layers.values())), k.shape[0], "k")
        k, v = self._places.own(k), self._places.own(v)
        if self._lineage is not None:
            checks.begun(len(self._lineage.sequences), k.shape[0])
        self._await(layer_id)
        held = self._layers.get(layer_id)
        codec = self._served[layer_id].codec
        layer = LayerCache.empty(layer_id, codec, self.pool, k) if held is None else held
        checks.increasing(layer, positions)
        if k.shape[2] == 1 and not self._rehearsal.running:
            self.finish_prefill()
        if not layer.settled:
            self._settle(layer)
        if k.shape[2] >= self.runtime.page_size:
            self._prefilling = True
        if self._lineage is not None:
            self._lineage.note(layer)
        layer.append(k, v, positions, self._places.stored(positions))
        self._layers[layer_id] = layer
        self._arrivals.came(layer_id, k, v)

    @keeps_numbers
    def attend(self, layer_id: int, q: Tensor) -> Tensor:
        """Attention of the last update's tokens over all that is stored, then settle the layer.

        q [batch, query_heads, tokens, key_dim], of the same tokens as the last `update` of this layer; returns
        [batch, query_heads, tokens, value_dim] in q's dtype. A token sees what is no newer than itself; what sees
        nothing, as padding at -1 does, gets 0. Scores and sums are in float32 at least.

        Raises InputError; StateError before any update, or when several tokens are asked about twice; PoolFullError
        if settling finds no room, in which case the layer is as before and `attend` may be called again.
        """
        layer = self._read_layer(layer_id)
        checks.queries(self.model, layer, q)
        q = self._places.own(q)
        # An answer waits if settling raised after the other places were asked, who will not be asked again.
        output = self._answer(layer, q) if layer.answer is None else layer.answer
        if not layer.settled:
            layer.answer = output
            if not self._arrivals.waits(layer):
                self._settle(layer)
        return output

    def _answer(self, layer: LayerCache, q: Tensor) -> Tensor:
        served = self._served[layer.layer_id]
        output = reading.answer(layer, served, q, self._places, self._reads, self._prefetcher)
        window, remembers = self._query_windows[layer.layer_id], self._rehearsal.remembers(prefilling=self._prefilling)
        showing.ask(layer, q, window, remembers)
        return output

    @keeps_numbers
    def route(self, layer_id: int, probabilities: Tensor) -> Routing:
        """The router's choice for the last update's tokens: experts and weights [batch * tokens, experts_per_token].

        probabilities [batch, tokens, experts]: of the model's own gate, known after the layer's attention. Where ranks
        store what their experts are best for (`waits_for_route`), each takes its tokens now, and the layer is settled.

        Raises ConfigError without a router or experts, InputError for another shape, StateError before any update;
        PoolFullError if settling finds no room: the layer is then settled by another `route`, or by its next `update`.
        """
        routing.check(self.model, self.runtime)
        layer = self._read_layer(layer_id)
        batch, tokens = layer.queried.shape
        chosen = routing.choose(self.model, self.runtime, probabilities, batch=batch, tokens=tokens)
        self._arrivals.go_home(layer, chosen.home)
        if self.waits_for_route and not layer.settled:
            self._settle(layer)
        return chosen

    @property
    def waits_for_route(self) -> bool:
        """Whether each update must be followed by `route`, since tokens are stored where their experts are."""
        return self._places.by_expert is not None

    def retrieve(self, layer_id: int) -> ContextKV:
        """The stored tokens of a layer, decoded, oldest first: for an attention of the caller's own."""
        return showing.context(self._read_layer(layer_id))

    def view(self, layer_id: int) -> TokenView:
        """What policies are shown of a layer: its tokens, and the newest queries if any part looks at them.

        For calibrations. It shares memory with the cache, and is for reading, until the next call that changes it.
        """
        return showing.view(self._read_layer(layer_id))[0]

    @keeps_numbers
    def finish_prefill(self) -> None:
        """Settle what the prompt left: evict to budget and seal. Runs by itself at the first update of one token.

        A later update of a page or more begins another prompt; shorter ones (drafted tokens, say) go on decoding.
        Raises PoolFullError if the pages of all layers do not fit, nothing changed. If a compressor refuses what it is
        given, the layers before are settled, and no token is lost.
        """
        if self._prefilling:
            self._prefilling = False
            try:
                self._settle(*self._layers.values())
            except BaseException:
                self._prefilling = True
                raise

    def rehearsal(self) -> AbstractContextManager[None]:
        """For a second pass over a prompt: what is updated and attended within it is forgotten again when it ends.

        The attention that it gives to the prompt is what a SecondPassSelector scores by, at `finish_prefill`, which
        comes after. Raises StateError where the composition has no use for it, or the prompt is over.
        """
        return self._rehearsal.run(self.crop, prefilling=self._prefilling)

    def _settle(self, *unsettled: LayerCache) -> None:
        """Evict to budget, slide windows and seal in these layers: in all of them, or in none if the pool is full."""
        self._arrivals.check_home(unsettled)
        decided = self._settler.decide(unsettled, prefilling=self._prefilling)
        self._settler.carry_out(decided)
        self._finish(unsettled, decided)

    def _finish(self, unsettled: Iterable[LayerCache], decided: list[settling.Decision]) -> None:
        self._settler.finish(unsettled, prefilling=self._prefilling)
        if self._lineage is not None and decided:
            self._lineage.show(unsettled)

    @property
    def evicts(self) -> bool:
        """Whether tokens may leave: by a budget, by a window, or because the pool is full."""
        return self._settler.evicts

    def _await(self, *layer_ids: int) -> None:
        """Wait for the pages that `begin` promised these layers, if it did."""
        for layer_id in layer_ids:
            if self._promised is not None and layer_id not in self._layers:
                self._layers[layer_id] = self._promised.layer(layer_id)

    def _await_all(self) -> None:
        self._await(*range(len(self.model.layers)))

    def _read_layer(self, layer_id: int) -> LayerCache:
        checks.layer(self.model, layer_id)
        self._await(layer_id)
        if layer_id not in self._layers:
            raise StateError(f"layer {layer_id} is empty: there is nothing to read; call update first")
        return self._layers[layer_id]

    # --- sequences

    @property
    def sequences(self) -> int:
        """The batch: how many sequences the cache holds; 0 before the first update."""
        return next(iter(self._layers.values())).sequences if self._layers else 0

    @keeps_numbers
    def fork(self) -> PiKVCache:
        """A second cache that goes on from here: sealed pages are shared, tails are copied."""
        self._await_all()
        self._arrivals.check_home(self._layers.values())
        other, everyone = PiKVCache(self.model, self.runtime, pool=self.pool), torch.arange(self.sequences)
        copies = {i: functools.partial(layers.select, layer, everyone) for i, layer in self._layers.items()}
        layers.replace(other._layers, copies)
        other._prefilling = self._prefilling
        other._lineage = self._lineage and self._lineage.copy()
        return other

    @keeps_numbers
    def reorder(self, ids: Tensor | Iterable[int]) -> None:
        """Make sequence i what sequence ids[i] is now; one may come several times (beam search) or not at all."""
        self._await_all()
        self._select(checks.index(ids if isinstance(ids, Tensor) else list(ids), self.sequences, "ids"))

    @keeps_numbers
    def drop(self, ids: Tensor | Iterable[int]) -> None:
        """Forget the sequences with these numbers; the others move up in order."""
        self._await_all()
        gone = checks.index(ids if isinstance(ids, Tensor) else list(ids), self.sequences, "ids")
        self._select(torch.tensor([i for i in range(self.sequences) if i not in set(gone.tolist())], dtype=torch.int64))

    def _select(self, index: Tensor) -> None:
        if not len(index):
            self.reset()
            return
        self._arrivals.check_home(self._layers.values())
        chosen = {i: functools.partial(layers.select, layer, index) for i, layer in self._layers.items()}
        layers.replace(self._layers, chosen)
        self._lineage = self._lineage and self._lineage.select(index)

    @keeps_numbers
    def join(self, other: PiKVCache) -> None:
        """Add the sequences of another cache after this one's. Both must have the same model, runtime and pool.

        The other cache stays as it is. Layers that were updated and not settled are settled first.
        """
        if other.model != self.model or other.runtime != self.runtime or other.pool is not self.pool:
            raise InputError("other must share the model, the runtime and the pool of this cache; give both one pool=")
        self._await_all()
        other._await_all()
        if not other._layers:
            return
        checks.same_layers(self._layers, other._layers)
        caches = [self] if other is self else [self, other]
        for cache in caches:
            cache._arrivals.check_home(cache._layers.values())
        pending = [(cache, [layer for layer in cache._layers.values() if not layer.settled]) for cache in caches]
        decisions = [cache._settler.decide(unsettled, prefilling=cache._prefilling) for cache, unsettled in pending]
        self._settler.carry_out([decision for decided in decisions for decision in decided])
        for (cache, unsettled), decided in zip(pending, decisions, strict=True):
            cache._finish(unsettled, decided)
        lineages = [(cache._lineage, cache.sequences) for cache in (self, other) if cache._layers]
        parts = {i: [*([self._layers[i]] if self._layers else []), theirs] for i, theirs in other._layers.items()}
        layers.replace(self._layers, {i: functools.partial(layers.joined, part) for i, part in parts.items()})
        self._prefilling = self._prefilling or other._prefilling
        self._lineage = Lineage.joined(lineages)

    @keeps_numbers
    def crop(self, tokens: int | Tensor) -> None:
        """Forget every token at position `tokens` or later; one number, or one a sequence [batch].

        Raises StateError if a window has dropped what the next query would see.
        """
        self._await_all()
        end = checks.ends(tokens, self.sequences)
        self._arrivals.check_home(self._layers.values())
        for layer in self._layers.values():
            checks.seen_from(layer, end)
        for layer in self._layers.values():
            if bool((end <= layer.last).any()):
                settling.crop(layer, end)
        if self._lineage is not None and self._layers:
            self._lineage.crop(end)

    def reset(self) -> None:
        """Forget everything; the next update may bring another batch."""
        layers.release(self._layers)
        self._layers.clear()
        self._arrivals.clear()
        self._lineage = self._promised = None
        self._reads = ReadCounter(self.runtime.page_selector)
        self._prefilling = True

    # --- away and back

    @keeps_numbers
    def commit(self, beside: Mapping[str, Tensor] = _NOTHING) -> Version:
        """Make a version of all that the cache holds, durable when this returns: only new pages are written.

        Between steps. beside: tensors of the caller's own to keep with it, which the states of the streamer's manifest
        then have, under "beside." and their names. Raises ConfigError without a streamer; StoreError, the cache and
        older versions as before.
        """
        self._await_all()
        self._arrivals.check_home(self._layers.values())
        return checkpoint.commit(self.model, self.runtime, self.pool, self._layers, self._prefilling, beside)

    @keeps_numbers
    def stream(self) -> None:
        """Begin to write the pages that are new since the last commit, so that the next one has less to do.

        The pages are copied and written in the background; it waits only behind a backlog. Raises as `commit` does.
        """
        self._await_all()
        checkpoint.stream(self.runtime, self.pool, self._layers)

    @classmethod
    @keeps_numbers
    def restore(
        cls,
        model: ModelConfig,
        runtime: RuntimeConfig,
        version: Version | None = None,
        *,
        pool: PagePool | None = None,
        may_differ: Iterable[str] = (),
    ) -> PiKVCache:
        """The cache of a version of the runtime's streamer, the newest by default, which goes on as that one would.

        may_differ: names of policies that may be others than at the commit, such as "page_selector". Backends, the
        device and tiers may always be.

        Raises ConfigError for another model or composition; VersionError; PoolFullError; DamagedError, which says what
        tokens are lost and which version is undamaged, `newest_good`.
        """
        cache = cls(model, runtime, pool=pool)
        restored, cache._prefilling = restoring.restore(model, runtime, cache.pool, cache._served, version, may_differ)
        cache._layers.update(restored)
        return cache

    @keeps_numbers
    def pin(self, layer_id: int, *, before: int | None = None) -> None:
        """Fetch sealed pages of a layer and keep them near: those of tokens before a position, such as a prompt's end.

        before: None pins the whole layer, pages to come included, in all caches of the pool. Raises ConfigError without
        tiers; InputError; StateError before any update; PoolFullError where they do not fit near, and pins none.
        """
        pinning.pin(self._read_layer(layer_id), before)

    @keeps_numbers
    def unpin(self, layer_id: int) -> None:
        """Let the pages of a layer go far again. Raises ConfigError without tiers, StateError before any update."""
        pinning.unpin(self._read_layer(layer_id))

    # --- reports

    def stored_bytes(self) -> StoredBytes:
        """The bytes that this cache holds, read from its storages."""
        return StoredBytes.of(self._layers.values())

    def page_reads(self) -> PageReads:
        """What the tokens decoded since the cache was made, or reset, have read of the sealed pages, layer by layer.

        Raises ConfigError without a page selector: everything is read.
        """
        return self._reads.report(self._served, self.pool)

    @property
    def foresight(self) -> Foresight:
        """How well the runtime's predictor has foreseen what layers choose. Raises ConfigError without one."""
        if self._prefetcher is None:
            raise ConfigError("foresight needs a predictor in the runtime, such as AsLastStep()")
        return self._prefetcher.foresight

    def auditing_reads(self) -> AbstractContextManager[None]:
        """While this is open, what decoded tokens leave out is measured too: `page_reads` has the true share.

        Attention runs over everything beside what is read, so decoding is slower; its answers are the same. Raises
        ConfigError without a page selector.
        """
        return self._reads.auditing()

    def describe(self) -> Description:
        """Which parts are composed, and which backend attends in each layer."""
        return describe(self.runtime, self._served)
