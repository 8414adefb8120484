"""One layer of a cache: a tail and a table of sealed pages for each sequence and KV head."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from pikv.core.attended import Attended
from pikv.core.basis import Basis
from pikv.core.config import LayerConfig
from pikv.core.pool import PagePool
from pikv.core.ports.backend import Choice, IndexedPages, PageCodec, Pages
from pikv.core.ports.compressor import BasisCompressor
from pikv.core.ports.selector import AttendedTokenSelector
from pikv.core.query_window import QueryWindow
from pikv.core.tables import ABSENT, PageTable, all_live, live_slots, pack_slots
from pikv.core.tail import EMPTY, Tail
from pikv.core.views import ContextKV, TokenView

NEVER = -1
PADDING = -1


@attrs.define(kw_only=True)
class LayerCache:
    """The tokens of one layer. Tables, lengths and positions live on the CPU, keys and values on the model's device.

    first, last: int64 [sequences], the oldest and newest position that a sequence has seen, NEVER before any. seen:
    int64 [sequences], the tokens offered to this place. forgotten: int64 [sequences], the newest position that the
    window left out. queried: int64 [sequences, tokens], the positions of the last update, below 0 for padding; padded:
    whether it had any. settled: whether that update has been evicted from, and sealed. asked: whether it has been
    attended from; answer: what attention gave, until the layer is settled. newest_queries: the queries that the token
    selector looks at, if it does. split: int64 [sequences, kv_heads], the tokens that each row was given by scores,
    NEVER before that. attended: what the token selector remembers of the attention that tokens have got, if it does.
    basis: that the sealed pages are written in, if their compressor has one.
    """

    layer_id: int
    codec: PageCodec
    pool: PagePool
    tail: Tail
    table: PageTable
    first: Tensor
    last: Tensor
    seen: Tensor
    forgotten: Tensor
    queried: Tensor
    split: Tensor
    newest_queries: QueryWindow | None = None
    attended: Attended | None = None
    basis: Basis | None = None
    padded: bool = False
    asked: bool = False
    answer: Tensor | None = None
    settled: bool = True
    _pages: Pages | None = None
    _indexed_pages: IndexedPages | None = None

    @classmethod
    def empty(cls, layer_id: int, codec: PageCodec, pool: PagePool, keys: Tensor) -> LayerCache:
        """A layer without tokens for sequences such as those of keys [sequences, kv_heads, tokens, key_dim]."""
        sequences, kv_heads = keys.shape[:2]
        never = torch.full((sequences,), NEVER)
        return cls(
            layer_id=layer_id,
            codec=codec,
            pool=pool,
            tail=Tail.empty(codec.layer, keys),
            table=PageTable.empty(sequences, kv_heads),
            first=never,
            last=never,
            seen=torch.zeros(sequences, dtype=torch.int64),
            forgotten=never,
            queried=torch.empty(sequences, 0, dtype=torch.int64),
            split=torch.full((sequences, kv_heads), NEVER),
        )

    @property
    def config(self) -> LayerConfig:
        """The layer's shape and attention."""
        return self.codec.layer

    @property
    def sequences(self) -> int:
        """The batch."""
        return len(self.last)

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.codec.form.page_size

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, stored: Tensor) -> None:
        """Take new tokens into the tail.

        positions: int64 [sequences, tokens], below 0 for padding; stored: the same, -1 also for other places' tokens.
        """
        padded = _padded(positions)
        if padded or stored is not positions or not positions.shape[1]:
            self.tail.append(keys, values, stored)
            self._count(positions, stored)
        else:  # as most updates are, and all of most decoding
            self.tail.append_all(keys, values, positions)
            if NEVER in self.first.tolist():
                self.first = torch.where(self.first == NEVER, positions[:, 0], self.first)
            self.last = positions[:, -1]
            self.seen = self.seen + positions.shape[1]
        self.queried, self.padded, self.asked, self.answer, self.settled = positions, padded, False, None, False

    def _count(self, positions: Tensor, stored: Tensor) -> None:
        offered = F.pad(positions, (0, 1), value=NEVER)  # an update may bring no tokens
        oldest = offered.masked_fill(offered < 0, torch.iinfo(torch.int64).max).amin(-1)
        newest = offered.amax(-1)
        self.first = torch.where((self.first == NEVER) & (newest >= 0), oldest, self.first)
        self.last = torch.maximum(self.last, newest)
        self.seen = self.seen + (stored >= 0).sum(-1)

    def ask(self, queries: Tensor, window: int | None, remembers: AttendedTokenSelector | None) -> None:
        """Note that the last update's queries [sequences, query_heads, tokens, key_dim] attend, once for each update.

        window: how many of the newest queries the token selector looks at; None if it does not. remembers: who folds
        the attention that they give into what it remembers, if anybody does.
        """
        if self.asked:
            return
        if remembers is not None:
            view = attrs.evolve(self.view()[0], queries=queries, asked=self.queried)
            before = self.attended or Attended.none(view.positions)
            view = attrs.evolve(view, attended=before.at(view.positions))
            self.attended = Attended.of(view.positions, remembers.fold(view))
        if window is not None:
            newest = self.newest_queries or QueryWindow.empty(queries, window)
            self.newest_queries = newest.followed_by(queries, self.queried)
        self.asked = True

    def asked_from(self) -> Tensor:
        """Where the last update's queries stand, padding that stands somewhere included: int64 [sequences, tokens]."""
        return torch.where(self.queried < PADDING, -2 - self.queried, self.queried) if self.padded else self.queried

    def unseen_from_now_on(self) -> Tensor | None:
        """The newest position that no query sees from now on, int64 [sequences]; None if all are seen.

        The last of several tokens may be drafted ones, which are cropped again: a page of them at most.
        """
        if self.config.window is None:
            return None
        drafted = min(self.queried.shape[1], self.page_size) - 1
        return self.last - self.config.window - max(0, drafted)

    def fitted_basis(self) -> Basis | None:
        """The basis to write new pages in, fitted to the tail where a sequence has no pages yet. Changes nothing."""
        compressor = self.codec.compressor
        if not isinstance(compressor, BasisCompressor):
            return None
        unwritten = (self.table.counts == 0).all(-1)
        if self.basis is not None and not bool(unwritten.any()):
            return self.basis
        keys, values, positions = (
            states[:, :, : self.tail.width] for states in (self.tail.keys, self.tail.values, self.tail.positions)
        )
        basis = compressor.fit(self.config, keys, values, positions != EMPTY)
        return basis if self.basis is None else self.basis.replaced(unwritten, basis)

    def pages(self) -> Pages:
        """The sealed pages as kernels take them, those that are far fetched; made once after a change of the table."""
        if self._pages is None or self.pool.residency is not None:
            width = self.table.width
            self._pages = self._pages_at(self.table.ids[..., :width], self.table.live[..., :width])
        return self._pages

    def _pages_at(self, ids: Tensor, live: Tensor) -> Pages:
        """The pages with these ids int32 [sequences, kv_heads, n], of which live ones are made resident."""
        present = ids != ABSENT
        if self.pool.residency is not None:
            present &= live != 0
            self.pool.residency.fetch(self.codec.form, ids[present].unique(), self.layer_id)
        rows = self.pool.rows(ids.clamp(min=0)).masked_fill(~present, 0)  # page 0 itself may be free
        ordered = rows.permute(2, 0, 1).flatten()
        in_place = bool((live == all_live(self.page_size)).all()) and bool((ordered.diff() == 1).all())
        return Pages(
            slab=self.pool.slab(self.codec.form),
            rows=rows.to(self.pool.device),
            live=live.to(self.pool.device),
            run=int(ordered[0]) if in_place and len(ordered) else None,
            basis=self.basis,
        )

    def some_pages(self, choice: Choice) -> Pages:
        """The pages that each row reads; those that are far are fetched."""
        if self.pool.residency is not None:
            columns, width = choice.columns.cpu(), self.table.width
            ids, live = (states[..., :width].gather(-1, columns) for states in (self.table.ids, self.table.live))
            return attrs.evolve(self._pages_at(ids, choice.read(live)), run=None)
        everything, columns = self.pages(), choice.columns
        rows, live = everything.rows.gather(-1, columns), everything.live.gather(-1, columns)
        return attrs.evolve(everything, rows=rows, live=choice.read(live), run=None)

    def indexed_pages(self) -> IndexedPages:
        """What the page selector keeps of the sealed pages, as kernels take it; made once after each change."""
        if self._indexed_pages is None:
            ids = self.table.ids[..., : self.table.width].clamp(min=0)  # a row of ABSENT ones is never looked at
            self._indexed_pages = IndexedPages(
                index=self.pool.index(self.codec.form), ids=ids.to(self.pool.device), counts=self.table.counts
            )
        return self._indexed_pages

    def add_pages(self, ids: Tensor, newest: Tensor, counts: Tensor, *, live: int) -> None:
        """Add sealed pages to the rows; see PageTable.append."""
        self.table.append(ids, newest, counts, live=live)
        self._changed_pages()

    def keep_pages(self, kept: Tensor) -> None:
        """Keep the pages marked in kept, bool [sequences, kv_heads, pages]; the others are let go."""
        if bool((kept | (self.table.ids[..., : kept.shape[-1]] == ABSENT)).all()):
            return
        self.pool.release(self.codec.form, self.table.keep(kept))
        self._changed_pages()

    def clear_slots(self, kept: Tensor) -> None:
        """Clear the live bits of slots not marked in kept, bool [sequences, kv_heads, pages, page_size]."""
        live = self.table.live[..., : self.table.width]
        fewer = live & pack_slots(kept)
        if not torch.equal(live, fewer):
            live.copy_(fewer)
            self._changed_pages()

    def _changed_pages(self) -> None:
        self._pages = self._indexed_pages = None

    def slot_positions(self) -> Tensor:
        """The positions of the pages' slots, int32 [sequences, kv_heads, pages, page_size], on the CPU."""
        form = self.codec.form
        if self.pool.residency is None:
            pages = self.pages()
            return form.view(pages.slab, "positions")[pages.rows.long()].cpu()
        positions: Tensor = form.view(self._stored(), "positions").unflatten(0, self.table.shape)
        return positions.cpu()

    def _stored(self) -> Tensor:
        """The bytes of all pages, near and far, row after row: uint8 [n, stride]; of absent ones any page's."""
        ids = self.table.ids[..., : self.table.width].flatten()
        return self.pool.bytes_of(self.codec.form, torch.where(ids == ABSENT, ids.max(), ids))

    def occupied(self) -> Tensor:
        """The tokens that each row takes room for, int64 [sequences, kv_heads]: a page counts whole."""
        return self.table.counts * self.page_size + self.tail.lengths

    def needs(self) -> list[int]:
        """The tokens that each sequence has seen, or takes room for if that is more."""
        return [max(seen, *rows) for seen, rows in zip(self.seen.tolist(), self.occupied().tolist(), strict=True)]

    def slots(self) -> Tensor:
        """The position in every slot, int32 [sequences, kv_heads, slots]: the pages', then the tail's; or EMPTY."""
        tail = self.tail.positions[..., : self.tail.width]
        if not self.table.width:
            return tail
        live = live_slots(self.table.live[..., : self.table.width], self.page_size)
        sealed = self.slot_positions().masked_fill(~live, EMPTY).flatten(2).to(tail.device)
        return torch.cat([sealed, tail], dim=-1)

    def view(self) -> tuple[TokenView, Tensor]:
        """The tokens as a policy sees them, and the slot of each: int64 [sequences, kv_heads, tokens].

        Each row's tokens stand from index 0 on; past a row's last one positions are EMPTY.
        """
        slots, window, attended = self.slots(), self.newest_queries, self.attended
        held = slots != EMPTY
        order = held.logical_not().int().sort(dim=-1, stable=True).indices[..., : int(held.sum(-1).amax())]
        positions = slots.gather(-1, order)
        view = TokenView(
            layer_id=self.layer_id,
            layer=self.config,
            positions=positions,
            attended=None if attended is None else attended.at(positions),
            queries=None if window is None else window.queries,
            asked=None if window is None else window.positions,
            decode=functools.partial(self._decode, order),
        )
        return view, order

    def _decode(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots in this order, [sequences, kv_heads, tokens, dim]."""
        keys, values = (states[:, :, : self.tail.width] for states in (self.tail.keys, self.tail.values))
        if self.table.width:
            old_keys, old_values = (
                states.unflatten(0, self.table.shape).flatten(2, 3)
                for states in self.codec.compressor.decode(self.codec.form, self._stored())
            )
            if self.basis is not None:
                old_keys, old_values = self.basis.read(old_keys, old_values)
            keys = torch.cat([old_keys.to(keys.dtype), keys], dim=2)
            values = torch.cat([old_values.to(values.dtype), values], dim=2)
        places = order[..., None]
        return (
            keys.gather(2, places.expand(-1, -1, -1, keys.shape[-1])),
            values.gather(2, places.expand(-1, -1, -1, values.shape[-1])),
        )

    def context(self) -> ContextKV:
        """All tokens, decoded, each row's from index 0 on."""
        return ContextKV.of(self.view()[0])

    def select(self, index: Tensor) -> LayerCache:
        """A layer of the sequences at index int64 [n]; it holds their pages too."""
        states: dict[str, Any] = {name: getattr(self, name)[index] for name in _BY_SEQUENCE}
        if self.newest_queries is not None:
            states["newest_queries"] = self.newest_queries.select(index)
        if self.attended is not None:
            states["attended"] = self.attended.select(index)
        if self.basis is not None:
            states["basis"] = self.basis.select(index)
        tail, table = self.tail.select(index), self.table.select(index)
        self.pool.retain(table.held())  # last: what raises before it holds nothing
        return attrs.evolve(self, tail=tail, table=table, answer=None, pages=None, indexed_pages=None, **states)

    @classmethod
    def joined(cls, layers: list[LayerCache]) -> LayerCache:
        """A layer of the sequences of several, which must be settled; it holds their pages too."""
        states: dict[str, Any] = {
            name: torch.cat([getattr(layer, name) for layer in layers]) for name in _BY_SEQUENCE - {"queried"}
        }
        windows = QueryWindow.completed(
            [layer.newest_queries for layer in layers], [len(layer.last) for layer in layers]
        )
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

    def release(self) -> None:
        """Let go of all pages."""
        self.pool.release(self.codec.form, self.table.held())


def _padded(positions: Tensor) -> bool:
    if positions.shape[1] == 1:  # a decoded token: a list is searched sooner than two tensors are made
        return any(position < 0 for (position,) in positions.tolist())
    return bool((positions < 0).any())


_BY_SEQUENCE = {"first", "last", "seen", "forgotten", "queried", "split"}
