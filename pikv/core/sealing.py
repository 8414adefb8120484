"""How tail tokens become pages: encoded and indexed first, so that an error leaves the layer as it was; then stored."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from pikv.core.basis import Basis
from pikv.core.layer import LayerCache
from pikv.core.ports.backend import NewPages, SealKernel
from pikv.core.tables import all_live, new_pages


@attrs.frozen
class Sealed:
    """Pages that are ready to be stored, in the order of `new_pages(counts)`.

    counts: int64 [sequences, kv_heads]. pages: uint8 [n, stride]. newest: int64 [n], the position of each page's last
    token. index: [n, *shape] for the page selector, None without one. basis: that they are written in, of the layer.
    """

    counts: Tensor
    pages: Tensor
    newest: Tensor
    index: Tensor | None
    basis: Basis | None


def encode(layer: LayerCache, kept: Tensor, counts: Tensor, seal: SealKernel) -> Sealed:
    """Encode the oldest of the kept tail tokens, bool [sequences, kv_heads, width] on the CPU. Changes nothing."""
    form, tail = layer.codec.form, layer.tail
    page, sequence, head = new_pages(counts)
    order = kept.logical_not().int().sort(dim=-1, stable=True).indices  # kept tokens first, oldest first
    slots = order[sequence[:, None], head[:, None], page[:, None] * form.page_size + torch.arange(form.page_size)]
    pages = tail.keys.new_zeros((len(page), form.stride), dtype=torch.uint8)  # zeros: padding is part of a checksum
    basis = layer.fitted_basis()
    index = seal(tail, NewPages(sequence=sequence, head=head, slots=slots, basis=basis), pages)
    last = (place.to(tail.keys.device) for place in (sequence, head, slots[:, -1]))
    return Sealed(counts, pages, tail.positions[tuple(last)].cpu().long(), index, basis)


def store(layer: LayerCache, sealed: Sealed) -> None:
    """Move pages from the front of the tail, which holds what is kept, to the pool, which has room for them."""
    form, pool, tail = layer.codec.form, layer.pool, layer.tail
    ids = pool.allocate(form, len(sealed.pages))
    if pool.residency is not None:
        pool.residency.belong(ids, layer.layer_id)
    slab = pool.slab(form)
    slab[pool.rows(ids).to(slab.device).long()] = sealed.pages
    if sealed.index is not None:
        index = pool.index(form)
        index[ids.to(index.device).long()] = sealed.index
    counts, layer.basis = sealed.counts, sealed.basis
    layer.add_pages(ids, sealed.newest, counts, live=all_live(layer.page_size))
    if tail.even and bool((counts == counts[0, 0]).all()):
        tail.drop_oldest(int(counts[0, 0]) * layer.page_size)
    else:
        tail.keep((torch.arange(tail.width) >= counts[..., None] * layer.page_size).to(tail.keys.device))
