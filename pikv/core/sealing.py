"""How tail tokens become pages: encoded and indexed first, so that an error leaves the layer as it was; then stored."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from pikv.core.layer import LayerCache
from pikv.core.ports.selector import PageSelector
from pikv.core.tables import all_live, new_pages

PAGES_AT_ONCE = 256  # encoded at a time, so that what encoding needs for itself stays small


@attrs.frozen
class Sealed:
    """Pages that are ready to be stored, in the order of `new_pages(counts)`.

    counts: int64 [sequences, kv_heads]. pages: uint8 [n, stride]. newest: int64 [n], the position of each page's last
    token. index: [n, *shape] for the page selector, None without one.
    """

    counts: Tensor
    pages: Tensor
    newest: Tensor
    index: Tensor | None


def encode(layer: LayerCache, kept: Tensor, counts: Tensor, page_selector: PageSelector | None) -> Sealed:
    """Encode the oldest of the kept tail tokens, bool [sequences, kv_heads, width] on the CPU. Changes nothing."""
    form, tail, compressor = layer.codec.form, layer.tail, layer.codec.compressor
    page, sequence, head = new_pages(counts)
    order = kept.logical_not().int().sort(dim=-1, stable=True).indices  # kept tokens first, oldest first
    slots = order[sequence[:, None], head[:, None], page[:, None] * form.page_size + torch.arange(form.page_size)]
    pages = tail.keys.new_zeros((len(page), form.stride), dtype=torch.uint8)  # zeros: padding is part of a checksum
    newest = torch.empty(len(page), dtype=torch.int64)
    index = (
        None
        if page_selector is None
        else layer.pool.index(form).new_empty(len(page), *layer.pool.index(form).shape[1:])
    )
    for start in range(0, len(page), PAGES_AT_ONCE):
        block = slice(start, start + PAGES_AT_ONCE)
        place = tuple(states[block].to(tail.keys.device) for states in (sequence[:, None], head[:, None], slots))
        positions = tail.positions[place]
        compressor.encode(form, tail.keys[place], tail.values[place], positions, pages[block])
        newest[block] = positions[:, -1].cpu().long()
        if page_selector is not None and index is not None:
            # By the keys as they decode, or a bound on them would not hold for what is read.
            page_selector.index(compressor.decode(form, pages[block])[0], index[block])
    return Sealed(counts, pages, newest, index)


def store(layer: LayerCache, sealed: Sealed) -> None:
    """Move pages from the front of the tail, which holds what is kept, to the pool, which has room for them."""
    form, pool, tail = layer.codec.form, layer.pool, layer.tail
    ids = pool.allocate(form, len(sealed.pages))
    slab = pool.slab(form)
    slab[pool.rows(ids).to(slab.device).long()] = sealed.pages
    if sealed.index is not None:
        index = pool.index(form)
        index[ids.to(index.device).long()] = sealed.index
    counts = sealed.counts
    layer.add_pages(ids, sealed.newest, counts, live=all_live(layer.page_size))
    if tail.even and bool((counts == counts[0, 0]).all()):
        tail.drop_oldest(int(counts[0, 0]) * layer.page_size)
    else:
        tail.keep((torch.arange(tail.width) >= counts[..., None] * layer.page_size).to(tail.keys.device))
