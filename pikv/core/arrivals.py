"""Tokens that wait for their routing, which says whose they are."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from torch import Tensor

from pikv.core.errors import StateError
from pikv.core.layer import LayerCache
from pikv.core.places import Places


@attrs.define
class Arrivals:
    """The last update of each layer that is sharded by expert, until it is routed. Empty in other compositions."""

    places: Places
    _waiting: dict[int, tuple[Tensor, Tensor]] = attrs.field(factory=dict, init=False)

    def came(self, layer_id: int, keys: Tensor, values: Tensor) -> None:
        """Note an update's keys and values [sequences, kv_heads, tokens, dim]."""
        if self.places.by_expert is not None:
            self._waiting[layer_id] = keys, values

    def waits(self, layer: LayerCache) -> bool:
        """Whether a layer's last update is not routed yet."""
        return layer.layer_id in self._waiting

    def go_home(self, layer: LayerCache, experts: Tensor) -> None:
        """Store here those of a layer's last tokens whose best expert is here: int64 [sequences * tokens]."""
        if self.waits(layer):
            keys, values = self._waiting[layer.layer_id]
            layer.rehome(keys, values, self.places.at_home(layer.queried, experts))
            del self._waiting[layer.layer_id]

    def check_home(self, layers: Iterable[LayerCache]) -> None:
        """Raise StateError unless the tokens of all these layers have been routed."""
        for layer in layers:
            if self.waits(layer):
                raise StateError(
                    f"layer {layer.layer_id}: its last update waits to be routed, which says what ranks store it; call "
                    f"route({layer.layer_id}, probabilities) after attend"
                )

    def clear(self) -> None:
        """Forget all."""
        self._waiting.clear()
