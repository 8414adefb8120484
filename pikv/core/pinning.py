"""Pins: pages that stay near whatever else needs room there."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv.core.errors import ConfigError, InputError
from pikv.core.layer import LayerCache
from pikv.core.residency import Residency
from pikv.core.tables import ABSENT


def pin(layer: LayerCache, before: int | None) -> None:
    """See PiKVCache.pin."""
    residency = _residency(layer)
    if before is not None and before < 1:
        raise InputError(f"before must be a position of 1 or more, or None for all, got {before}")
    with layer.pool.locked():
        residency.pin(layer.codec.form, _pages(layer, before), layer.layer_id)
        if before is None:
            residency.pinned_layers.add(layer.layer_id)


def unpin(layer: LayerCache) -> None:
    """See PiKVCache.unpin."""
    residency = _residency(layer)
    with layer.pool.locked():
        residency.pinned_layers.discard(layer.layer_id)
        residency.unpin(_pages(layer, None))


def _pages(layer: LayerCache, before: int | None) -> Tensor:
    """The layer's pages whose tokens all stand before a position: int32 [n], distinct."""
    ids, newest = layer.table.ids, layer.table.newest
    wanted = (ids != ABSENT) & (newest < (torch.iinfo(newest.dtype).max if before is None else before))
    held: Tensor = ids[wanted].unique()
    return held


def _residency(layer: LayerCache) -> Residency:
    if layer.pool.residency is None:
        raise ConfigError("pins need tiers in the runtime: without them all pages stay near")
    return layer.pool.residency
