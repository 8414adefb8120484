"""What a cache tells about itself: bytes, read from its storages, and its composition."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from pikv.core.layer import LayerCache


@attrs.frozen(kw_only=True)
class StoredBytes:
    """The bytes that a cache holds, read from its storages.

    pages: the slab rows of its sealed pages, a page shared with another cache included. tail: keys, values and
    positions that are not sealed, unused room and what token selectors keep included (queries, attention). indexes: of
    page selectors. tables: page tables, and the pool's entries for the pages. bases: that pages are written in; one
    that layers share counts once.
    """

    pages: int
    tail: int
    indexes: int
    tables: int
    bases: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.pages + self.tail + self.indexes + self.tables + self.bases

    @classmethod
    def of(cls, layers: Iterable[LayerCache]) -> StoredBytes:
        """What these layers hold."""
        pages = tables = tail = indexes = 0
        bases: dict[int, int] = {}
        for layer in layers:
            held, pool, form = layer.table.held().unique(), layer.pool, layer.codec.form
            pages += len(held) * pool.slab(form).stride(0)
            tables += layer.table.nbytes + len(held) * pool.bytes_a_page
            kept = (layer.tail, layer.newest_queries, layer.attended)
            tail += sum(part.nbytes for part in kept if part is not None)
            indexes += len(held) * pool.index_bytes_a_page(form)
            for columns in () if layer.basis is None else layer.basis.tensors:
                bases[columns.data_ptr()] = columns.untyped_storage().nbytes()
        return cls(pages=pages, tail=tail, indexes=indexes, tables=tables, bases=sum(bases.values()))

    def __str__(self) -> str:
        """One line, in MiB."""
        parts = ", ".join(f"{name} {nbytes / 2**20:.2f}" for name, nbytes in attrs.asdict(self).items())
        return f"{self.total / 2**20:.2f} MiB ({parts})"


@attrs.frozen(kw_only=True)
class LostTokens:
    """Tokens whose keys and values are lost in one layer: positions first to last of a sequence, in some KV head."""

    layer_id: int
    sequence: int
    first: int
    last: int

    def __str__(self) -> str:
        return f"layer {self.layer_id} lost tokens {self.first} to {self.last} of sequence {self.sequence}"


@attrs.frozen
class Description:
    """Which parts a cache is composed of, and which backend serves each step and why."""

    parts: dict[str, str]
    steps: dict[str, str]

    def __str__(self) -> str:
        """One line a part."""
        rows = {**self.parts, **self.steps}
        width = max(len(name) for name in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())
