"""The bytes that a cache of some composition will hold and read, by the core's own forms and budgets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import attrs
import torch

from pikv.core.budget import Budget
from pikv.core.config import LayerConfig, ModelConfig
from pikv.core.places import Places
from pikv.core.pool import PagePool
from pikv.core.ports import BasisCompressor
from pikv.core.reports import StoredBytes
from pikv.core.runtime import RuntimeConfig
from pikv.core.tail import ROOM

_ENOUGH = 1 << 32  # bytes: the pool is asked for sizes and holds nothing
_A_TABLE_ENTRY = 4 + 8 + 8  # of a PageTable: id, live, newest


@attrs.frozen(kw_only=True)
class CachePlan:
    """What a cache will hold once its texts have been read, by layer, and what each decoded token reads of it.

    stored: as `PiKVCache.stored_bytes` counts it; a basis that layers share stands in the first. read_bytes: of all
    sequences together: pages, the index they are chosen by, and the tail.
    """

    stored: tuple[StoredBytes, ...]
    read_bytes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all layers."""
        return sum(layer.total for layer in self.stored)

    @classmethod
    def of(cls, model: ModelConfig, runtime: RuntimeConfig, *, tokens: int, batch: int = 1) -> Self:
        """Plan for `batch` sequences of so many tokens each.

        A layer's heads are taken to share its budget evenly where scores would split it, which changes the table's room
        alone. Raises ConfigError for a composition that the model cannot have.
        """
        runtime.check_serves(model)
        pool, budget = PagePool(model, runtime, capacity_bytes=_ENOUGH), Budget.of(Places.of(model, runtime), runtime)
        stored, read = [], []
        for layer_id, bases in enumerate(_bases(model, runtime, batch)):
            kept = None if budget is None else budget.share(layer_id, [tokens], anew=False).even[0].tolist()
            rows = _Rows.of(model.layers[layer_id], runtime, kept, tokens)
            layer = _Layer(model=model, runtime=runtime, pool=pool, layer_id=layer_id, rows=rows)
            stored.append(attrs.evolve(layer.stored(tokens, batch), bases=bases))
            read.append(batch * layer.read_bytes())
        return cls(stored=tuple(stored), read_bytes=tuple(read))


@attrs.frozen(kw_only=True)
class _Rows:
    """Of each KV head the sealed pages, and the tokens in the tail."""

    pages: list[int]
    tail: list[int]

    @classmethod
    def of(cls, layer: LayerConfig, runtime: RuntimeConfig, kept: list[int] | None, tokens: int) -> Self:
        """kept: the tokens that each head may keep; None for all."""
        size, tail_tokens = runtime.page_size, runtime.tail_tokens
        rows = [tokens] * layer.kv_heads if kept is None else [min(tokens, row) for row in kept]
        sealed = [max(0, (row - tail_tokens) // size) for row in rows]
        tail = [row - size * pages for row, pages in zip(rows, sealed, strict=True)]
        if layer.window is not None:
            behind = max(0, tokens - layer.window) // size  # whole pages that no query sees any more
            last = (tokens - tail[0]) // size
            sealed = [min(pages, max(0, last - behind)) for pages in sealed]
            tail = [min(row, layer.window + size - 1) for row in tail]
        return cls(pages=sealed, tail=tail)


@attrs.frozen(kw_only=True)
class _Layer:
    model: ModelConfig
    runtime: RuntimeConfig
    pool: PagePool
    layer_id: int
    rows: _Rows

    @property
    def _config(self) -> LayerConfig:
        return self.model.layers[self.layer_id]

    @property
    def _token_bytes(self) -> int:
        """Of a token and KV head in the tail."""
        layer = self._config
        channels = layer.key_dim + (layer.value_dim if layer.values == "stored" else 0)
        return channels * self.model.dtype.itemsize

    def stored(self, tokens: int, batch: int) -> StoredBytes:
        form, count = self.runtime.form(self.model, self.layer_id), batch * sum(self.rows.pages)
        entries = batch * self._config.kv_heads * max(self.rows.pages)
        return StoredBytes(
            pages=count * form.stride,
            tail=batch * (self._tail_bytes(tokens) + self._remembered_bytes()),
            indexes=count * self.pool.index_bytes_a_page(form),
            tables=entries * _A_TABLE_ENTRY + batch * self._config.kv_heads * 8 + count * self.pool.bytes_a_page,
        )

    def _tail_bytes(self, tokens: int) -> int:
        room = min(-(-tokens // ROOM) * ROOM, self.runtime.tail_tokens + 2 * self.runtime.page_size)
        return self._config.kv_heads * (room * (self._token_bytes + 4) + 8)  # a position each, and lengths

    def _remembered_bytes(self) -> int:
        """What token selectors keep of a sequence: queries and their positions, attention and the tokens' positions."""
        queries = (self.runtime.query_window or 0) * (
            self._config.query_heads * self._config.key_dim * self.model.dtype.itemsize + 8
        )
        longest = max(p * self.runtime.page_size + t for p, t in zip(self.rows.pages, self.rows.tail, strict=True))
        return queries + (0 if self.runtime.remembers is None else self._config.kv_heads * longest * (4 + 4))

    def read_bytes(self) -> int:
        """By one token of one sequence."""
        form, selector, pages = (
            self.runtime.form(self.model, self.layer_id),
            self.runtime.page_selector,
            self.rows.pages,
        )
        tail = sum(self.rows.tail) * self._token_bytes
        if selector is None or self.layer_id < selector.dense_layers:
            return tail + sum(pages) * form.stride
        chosen = sum(min(selector.pages, row) for row in pages)
        return tail + chosen * form.stride + sum(pages) * self.pool.index_bytes_a_page(form)


def _bases(model: ModelConfig, runtime: RuntimeConfig, batch: int) -> Iterator[int]:
    """Of each layer, the bytes of the basis that its pages are written in, unless an earlier layer has the same."""
    seen: dict[int, torch.Tensor] = {}  # kept, so that no other takes their place in memory
    for layer_id, layer in enumerate(model.layers):
        compressor, nbytes = runtime.compressor_of(model, layer_id), 0
        if isinstance(compressor, BasisCompressor):
            keys = torch.zeros(1, layer.kv_heads, 1, layer.key_dim)
            values = torch.zeros(1, layer.kv_heads, 1, layer.value_dim)
            basis = compressor.fit(layer, keys, values, torch.ones(1, layer.kv_heads, 1, dtype=torch.bool))
            for columns in basis.tensors:
                if columns.data_ptr() not in seen:
                    nbytes += columns.untyped_storage().nbytes() * (1 if basis.shared else batch)
                seen[columns.data_ptr()] = columns
        yield nbytes
