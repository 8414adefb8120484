"""Records: a sealed page together with what the page selector keeps of it, one run of bytes as a store holds it."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv.core.basis import Basis
from pikv.core.forms import ALIGNMENT, PageForm
from pikv.core.pool import PagePool
from pikv.core.ports import PageCodec, PageSelector
from pikv.core.torch_backend import index_pages


def record_bytes(pool: PagePool, form: PageForm) -> int:
    """The length of a record: of the page, and of its index at the next multiple of 64 bytes."""
    return form.stride + -(-pool.index_bytes_a_page(form) // ALIGNMENT) * ALIGNMENT


def of_pages(pool: PagePool, form: PageForm, ids: Tensor) -> Tensor:
    """The records of pages: uint8 [n, record_bytes] on the CPU; the slab itself where it holds just them in a run."""
    rows, slab, index_bytes = pool.rows(ids).long(), pool.slab(form), pool.index_bytes_a_page(form)
    in_place = pool.residency is None and slab.device.type == "cpu"
    if not index_bytes and in_place and len(rows) and bool((rows.diff() == 1).all()):
        return slab[int(rows[0]) : int(rows[-1]) + 1]
    pages = pool.bytes_of(form, ids).cpu()
    if not index_bytes:
        return pages
    records = pages.new_zeros(len(ids), record_bytes(pool, form))
    records[:, : form.stride] = pages
    index = pool.index(form)[ids.to(slab.device).long()].cpu().contiguous()
    records[:, form.stride : form.stride + index_bytes] = index.flatten(1).view(torch.uint8)
    return records


def target(pool: PagePool, form: PageForm, ids: Tensor, stored_bytes: int) -> Tensor:
    """Memory for the records of pages, stored_bytes each: the slab itself where that will do."""
    rows, slab = pool.rows(ids).long(), pool.slab(form)
    if stored_bytes == form.stride and slab.device.type == "cpu" and len(rows) and bool((rows.diff() == 1).all()):
        return slab[int(rows[0]) : int(rows[-1]) + 1]
    return torch.empty(len(ids), stored_bytes, dtype=torch.uint8)


def put(
    pool: PagePool,
    codec: PageCodec,
    ids: Tensor,
    records: Tensor,
    selector: PageSelector | None,
    basis: Basis | None = None,
) -> None:
    """Store the pages of records from `target`, and their index.

    selector: makes the index anew; None takes it from the records, if there is one. basis: of these pages.
    """
    form, slab, index_bytes = codec.form, pool.slab(codec.form), pool.index_bytes_a_page(codec.form)
    rows = pool.rows(ids).to(slab.device).long()
    if records.untyped_storage().data_ptr() != slab.untyped_storage().data_ptr():
        slab[rows] = records[:, : form.stride].to(slab.device)
    if not index_bytes or not len(ids):
        return
    index = pool.index(form)
    if selector is None:
        stored = records[:, form.stride : form.stride + index_bytes].contiguous()
        index[ids.to(slab.device).long()] = stored.view(index.dtype).view(len(ids), *index.shape[1:]).to(slab.device)
        return
    index[ids.to(slab.device).long()] = index_pages(codec, selector, slab[rows], basis)
