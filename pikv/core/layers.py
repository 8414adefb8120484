"""The layers of a cache: given up and replaced, all or none; layers of other sequences, and of known pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from pikv.core.attended import Attended
from pikv.core.basis import Basis
from pikv.core.layer import NEVER, LayerCache
from pikv.core.lineage import KnownTokens
from pikv.core.pool import PagePool
from pikv.core.ports.backend import PageCodec
from pikv.core.query_window import QueryWindow
from pikv.core.tables import PageTable, all_live, new_pages
from pikv.core.tail import Tail

_BY_SEQUENCE = {"first", "last", "seen", "forgotten", "queried", "split"}


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


def select(layer: LayerCache, index: Tensor) -> LayerCache:
    """A layer of the sequences at index int64 [n]; it holds their pages too."""
    states: dict[str, Any] = {name: getattr(layer, name)[index] for name in _BY_SEQUENCE}
    if layer.newest_queries is not None:
        states["newest_queries"] = layer.newest_queries.select(index)
    if layer.attended is not None:
        states["attended"] = layer.attended.select(index)
    if layer.basis is not None:
        states["basis"] = layer.basis.select(index)
    tail, table = layer.tail.select(index), layer.table.select(index)
    layer.pool.retain(table.held())  # last: what raises before it holds nothing
    return attrs.evolve(layer, tail=tail, table=table, answer=None, pages=None, indexed_pages=None, **states)


def joined(layers: list[LayerCache]) -> LayerCache:
    """A layer of the sequences of several, which must be settled; it holds their pages too."""
    states: dict[str, Any] = {
        name: torch.cat([getattr(layer, name) for layer in layers]) for name in _BY_SEQUENCE - {"queried"}
    }
    windows = QueryWindow.completed([layer.newest_queries for layer in layers], [len(layer.last) for layer in layers])
    tail, table = Tail.joined([layer.tail for layer in layers]), PageTable.joined([layer.table for layer in layers])
    newest_queries = QueryWindow.joined(windows) if windows else None
    attended = Attended.completed([layer.attended for layer in layers], [layer.tail.positions for layer in layers])
    bases = [basis for layer in layers if (basis := layer.fitted_basis()) is not None]
    layers[0].pool.retain(table.held())  # last: what raises before it holds nothing
    return attrs.evolve(
        layers[0],
        newest_queries=newest_queries,
        attended=Attended.joined(attended),
        basis=Basis.joined(bases) if bases else None,
        tail=tail,
        table=table,
        queried=torch.empty(len(states["last"]), 0, dtype=torch.int64),
        asked=all(layer.asked for layer in layers),
        padded=False,
        answer=None,
        pages=None,
        indexed_pages=None,
        **states,
    )


def adopted(layer_id: int, codec: PageCodec, pool: PagePool, known: Sequence[KnownTokens]) -> LayerCache:
    """A layer that holds the pages of the known keys, as if their tokens had come, and been settled."""
    config, page_size = codec.layer, codec.form.page_size
    nothing = torch.empty(len(known), config.kv_heads, 0, config.key_dim, dtype=codec.dtype, device=pool.device)
    layer = LayerCache.empty(layer_id, codec, pool, nothing)
    pages = torch.tensor([len(each.keys) for each in known])
    counts = pages[:, None].repeat(1, config.kv_heads)
    ids = torch.full((int(pages.max()), len(known), config.kv_heads), NEVER, dtype=torch.int32)
    for sequence, each in enumerate(known):
        if each.keys:
            ids[: len(each.keys), sequence] = pool.prefixes.pages(each.keys, layer_id)
    page, sequence_of, head = new_pages(counts)
    held = ids[page, sequence_of, head]
    layer.add_pages(held, (page + 1) * page_size - 1, counts, live=all_live(page_size))
    layer.last, layer.seen = pages * page_size - 1, pages * page_size
    layer.first = layer.first.masked_fill(pages > 0, 0)
    pool.retain(held)  # last: what raises before it holds nothing
    return layer
