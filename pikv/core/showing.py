"""What policies are shown of a layer: its tokens, wherever they lie, the newest queries, and what these attended to."""

from __future__ import annotations

import functools

import attrs
import torch
from torch import Tensor

from pikv.core.attended import Attended
from pikv.core.layer import LayerCache
from pikv.core.ports.selector import AttendedTokenSelector
from pikv.core.query_window import QueryWindow
from pikv.core.tables import ABSENT, live_slots
from pikv.core.tail import EMPTY
from pikv.core.views import ContextKV, TokenView


def ask(layer: LayerCache, queries: Tensor, window: int | None, remembers: AttendedTokenSelector | None) -> None:
    """Note that the last update's queries [sequences, query_heads, tokens, key_dim] attend, once for each update.

    window: how many of the newest queries the token selector looks at; None if it does not. remembers: who folds
    the attention that they give into what it remembers, if anybody does.
    """
    if layer.asked:
        return
    if remembers is not None:
        shown = attrs.evolve(view(layer)[0], queries=queries, asked=layer.queried)
        before = layer.attended or Attended.none(shown.positions)
        shown = attrs.evolve(shown, attended=before.at(shown.positions))
        layer.attended = Attended.of(shown.positions, remembers.fold(shown))
    if window is not None:
        newest = layer.newest_queries or QueryWindow.empty(queries, window)
        layer.newest_queries = newest.followed_by(queries, layer.queried)
    layer.asked = True


def slot_positions(layer: LayerCache) -> Tensor:
    """The positions of the pages' slots, int32 [sequences, kv_heads, pages, page_size], on the CPU."""
    form = layer.codec.form
    if layer.pool.residency is None:
        pages = layer.pages()
        return form.view(pages.slab, "positions")[pages.rows.long()].cpu()
    positions: Tensor = form.view(_stored(layer), "positions").unflatten(0, layer.table.shape)
    return positions.cpu()


def _stored(layer: LayerCache) -> Tensor:
    """The bytes of all pages, near and far, row after row: uint8 [n, stride]; of absent ones any page's."""
    ids = layer.table.ids[..., : layer.table.width].flatten()
    return layer.pool.bytes_of(layer.codec.form, torch.where(ids == ABSENT, ids.max(), ids))


def slots(layer: LayerCache) -> Tensor:
    """The position in every slot, int32 [sequences, kv_heads, slots]: the pages', then the tail's; or EMPTY."""
    tail = layer.tail.positions[..., : layer.tail.width]
    if not layer.table.width:
        return tail
    live = live_slots(layer.table.live[..., : layer.table.width], layer.page_size)
    sealed = slot_positions(layer).masked_fill(~live, EMPTY).flatten(2).to(tail.device)
    return torch.cat([sealed, tail], dim=-1)


def view(layer: LayerCache) -> tuple[TokenView, Tensor]:
    """The tokens as a policy sees them, and the slot of each: int64 [sequences, kv_heads, tokens].

    Each row's tokens stand from index 0 on; past a row's last one positions are EMPTY.
    """
    there, window, attended = slots(layer), layer.newest_queries, layer.attended
    held = there != EMPTY
    order = held.logical_not().int().sort(dim=-1, stable=True).indices[..., : int(held.sum(-1).amax())]
    positions = there.gather(-1, order)
    shown = TokenView(
        layer_id=layer.layer_id,
        layer=layer.config,
        positions=positions,
        attended=None if attended is None else attended.at(positions),
        queries=None if window is None else window.queries,
        asked=None if window is None else window.positions,
        decode=functools.partial(_decode, layer, order),
    )
    return shown, order


def _decode(layer: LayerCache, order: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the slots in this order, [sequences, kv_heads, tokens, dim]."""
    keys, values = (states[:, :, : layer.tail.width] for states in (layer.tail.keys, layer.tail.values))
    if layer.table.width:
        old_keys, old_values = (
            states.unflatten(0, layer.table.shape).flatten(2, 3)
            for states in layer.codec.compressor.decode(layer.codec.form, _stored(layer))
        )
        if layer.basis is not None:
            positions = slot_positions(layer).flatten(2).to(old_keys.device)
            old_keys, old_values = layer.codec.read(old_keys, old_values, positions, layer.basis)
        keys = torch.cat([old_keys.to(keys.dtype), keys], dim=2)
        values = torch.cat([old_values.to(values.dtype), values], dim=2)
    places = order[..., None]
    return (
        keys.gather(2, places.expand(-1, -1, -1, keys.shape[-1])),
        values.gather(2, places.expand(-1, -1, -1, values.shape[-1])),
    )


def context(layer: LayerCache) -> ContextKV:
    """All tokens, decoded, each row's from index 0 on."""
    return ContextKV.of(view(layer)[0])
