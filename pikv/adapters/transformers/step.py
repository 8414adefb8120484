"""One forward call of a model, as its attention layers see it."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor

from pikv.adapters.transformers.latent import LatentKV
from pikv.adapters.transformers.text import Text
from pikv.core.cache import PiKVCache
from pikv.core.errors import StateError
from pikv.core.ports import Routing


@attrs.define(eq=False)
class Step:
    """The tokens of one forward call, on their way through the layers.

    positions: int64 [batch, tokens], below 0 for padding. mask: what the caller said of padding, [batch, tokens seen
    and new]. text: what the tokens are, if they are not embeddings. attended: how many layers have attended. routed:
    the router's choice in each layer with experts, if there is a router.
    """

    cache: PiKVCache
    positions: Tensor
    mask: Tensor | None
    latent: LatentKV | None
    text: Text | None
    attended: int = 0
    routed: dict[int, Routing] = attrs.field(factory=dict)
    _layer_id: int | None = None

    @property
    def complete(self) -> bool:
        """Whether every layer has taken the tokens and attended."""
        return self.attended == len(self.cache.model.layers)

    def take(self, layer_id: int, keys: Tensor, values: Tensor) -> None:
        """Store a layer's new keys and values; the layer's attention comes next."""
        if self._layer_id is not None:
            raise StateError(
                f"layer {self._layer_id} took new tokens and its attention did not ask the cache: this version of "
                "transformers does not hand the model's keywords down to it; the versions tried are in the docs"
            )
        if self.latent is None:
            self.cache.update(layer_id, self.positions, keys, values)
        else:
            self.cache.update(layer_id, self.positions, self.latent.keys(keys, values), None)
        self._layer_id = layer_id

    def attend(self, module: Any, query: Tensor, **settings: Any) -> Tensor:
        """Attention of query [batch, query_heads, tokens, key_dim] in the layer that has just taken tokens."""
        layer_id = self._layer_id
        if layer_id is None or layer_id != module.layer_idx:
            raise StateError(
                f"layer {module.layer_idx} attends without having stored its tokens (the last that did: {layer_id}); "
                "call the model with use_cache=True"
            )
        self._check(layer_id, **settings)
        self._layer_id = None
        if self.latent is None:
            output = self.cache.attend(layer_id, query)
        else:
            output = self.latent.leave(module, self.cache.attend(layer_id, self.latent.enter(module, query)))
        self.attended += 1
        return output

    def route(self, layer_id: int, probabilities: Tensor) -> None:
        """Let the router see how the model's gate spreads the tokens: [batch * tokens, experts]."""
        spread = probabilities.unflatten(0, tuple(self.positions.shape))
        self.routed[layer_id] = self.cache.route(layer_id, spread)

    def _check(self, layer_id: int, *, scale: float | None, softcap: float | None) -> None:
        """Raise if the scale or the softcap is not what it was when PiKV was attached."""
        layer = self.cache.model.layers[layer_id]
        if (scale is not None and scale != layer.scale) or softcap != layer.softcap:
            raise StateError(
                f"layer {layer_id} attends with scale {scale} and softcap {softcap}, and had {layer.scale} and "
                f"{layer.softcap} when PiKV was attached; attach again after changing the model"
            )
