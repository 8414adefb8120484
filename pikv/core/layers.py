"""The layers of a cache together: given up, and replaced, all or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pikv.core.layer import LayerCache


def release(layers: dict[int, LayerCache]) -> None:
    """Let go of the pages of all."""
    for layer in layers.values():
        layer.release()


def abandon(layers: dict[int, LayerCache]) -> None:
    """Release at a moment that the garbage collector chose, which may be within the pool's own code."""
    for layer in layers.values():
        layer.pool.release_later(layer.codec.form, layer.table.held())


def replace(layers: dict[int, LayerCache], makers: Mapping[int, Callable[[], LayerCache]]) -> None:
    """Put new layers in the place of all; if one cannot be made, everything stays as it is."""
    made: dict[int, LayerCache] = {}
    try:
        for layer_id, make in makers.items():
            made[layer_id] = make()
    except BaseException:
        release(made)
        raise
    release(layers)
    layers.update(made)
