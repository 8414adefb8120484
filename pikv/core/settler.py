"""Settler: how the layers of one cache are settled, in all of them or in none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from pikv.core import settling
from pikv.core.budget import Budget, Share
from pikv.core.config import ModelConfig
from pikv.core.errors import StateError
from pikv.core.exact import Refuse
from pikv.core.layer import LayerCache
from pikv.core.places import Places
from pikv.core.pool import PagePool
from pikv.core.ports.selector import SecondPassSelector
from pikv.core.runtime import RuntimeConfig
from pikv.core.serving import Served
from pikv.core.slab import trim


@attrs.frozen(kw_only=True, eq=False)
class Settler:
    """Evicts to the budget, slides windows and seals. prefilling: whether a prompt is coming in.

    With a budget, the survivors of a prompt wait in the tail, exact, until it has been finished.
    """

    model: ModelConfig
    runtime: RuntimeConfig
    pool: PagePool
    served: list[Served]
    budget: Budget | None
    layers: Mapping[int, LayerCache]

    @classmethod
    def of(
        cls,
        places: Places,
        runtime: RuntimeConfig,
        pool: PagePool,
        served: list[Served],
        layers: Mapping[int, LayerCache],
    ) -> Settler:
        """With this place's share of the runtime's budget, if it has one. layers: all that the cache has."""
        budget = Budget.of(places, runtime)
        return cls(model=places.model, runtime=runtime, pool=pool, served=served, budget=budget, layers=layers)

    @property
    def evicts(self) -> bool:
        """Whether tokens may leave: by a budget, by a window, or because the pool is full."""
        slides = any(layer.window is not None for layer in self.model.layers)
        return slides or self.budget is not None or not isinstance(self.runtime.when_full, Refuse)

    def decide(self, layers: Iterable[LayerCache], *, prefilling: bool) -> list[settling.Decision]:
        """What is to be done in these layers; changes nothing."""
        decided: dict[int, settling.Decision] = {}
        for layer in layers:
            decision = settling.decide(
                layer,
                selector=self.runtime.token_selector,
                share=self._share(layer, prefilling),
                split_by=self.runtime.split_by,
                leading=self._leading(layer.layer_id, decided),
                tail_tokens=None if self._holds(prefilling) else self.runtime.tail_tokens,
            )
            if decision is not None:
                decided[layer.layer_id] = decision
        return list(decided.values())

    def _leading(
        self, layer_id: int, decided: Mapping[int, settling.Decision]
    ) -> settling.Decision | LayerCache | None:
        """What will be done to the layer that this one follows, or the layer as it is; None if it follows none."""
        leader = self.runtime.leader_of(layer_id)
        if leader == layer_id:
            return None
        if leader not in self.layers:
            raise StateError(f"layer {layer_id} keeps what layer {leader} keeps, which is empty; update that one first")
        return decided.get(leader, self.layers[leader])

    def _share(self, layer: LayerCache, prefilling: bool) -> Share | None:
        """What the layer's rows may keep; None if everything, for want of a budget or of a second pass."""
        waits = prefilling and isinstance(self.runtime.remembers, SecondPassSelector)
        if self.budget is None or waits:
            return None
        return self.budget.share(layer.layer_id, layer.needs(), anew=prefilling)

    def _holds(self, prefilling: bool) -> bool:
        return self.budget is not None and prefilling

    def carry_out(self, decisions: list[settling.Decision]) -> None:
        """Do it; PoolFullError, and nothing is done, if there is no room for all of it."""
        if not decisions:
            return
        with self.pool.locked():
            settling.make_room(decisions, self.runtime.when_full)
            for decision in decisions:
                settling.carry_out(decision, self.served[decision.layer.layer_id].seal)
        of_prompt = decisions[-1].layer.queried.shape[1] > 1
        if of_prompt and self.budget is not None and decisions[-1].layer.layer_id == len(self.model.layers) - 1:
            trim()  # once for each chunk, when it has gone through all layers

    def finish(self, layers: Iterable[LayerCache], *, prefilling: bool) -> None:
        """Note that these layers are settled, and give room in their tails back."""
        for layer in layers:
            layer.settled, layer.answer = True, None
            if not self._holds(prefilling):
                layer.tail.shrink(self.runtime.tail_tokens + 2 * self.runtime.page_size)
