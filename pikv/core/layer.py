"""One layer of a cache: a tail and a table of sealed pages for each sequence and KV head."""

from __future__ import annotations

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
from pikv.core.query_window import QueryWindow
from pikv.core.tables import ABSENT, PageTable, all_live, pack_slots
from pikv.core.tail import EMPTY, Tail

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

    def rehome(self, keys: Tensor, values: Tensor, stored: Tensor) -> None:
        """Store those of the last update's tokens at the positions `stored`, and no others of them.

        keys, values: of that update, as `append` took them. stored: int64 [sequences, tokens], below 0 for the others.
        """
        past = torch.iinfo(torch.int32).max  # what has no new token keeps all
        first = F.pad(self.queried.masked_fill(self.queried < 0, past), (0, 1), value=past).amin(-1)
        there = self.tail.positions[..., : self.tail.width]
        older = there < first[:, None, None].to(there.device)
        self.tail.reserve(self.tail.width + stored.shape[1])  # first, so that nothing has changed if there is no room
        self.seen = self.seen - (~older)[:, 0].sum(-1).cpu() + (stored >= 0).sum(-1)
        self.tail.keep(older)
        self.tail.append(keys, values, stored)

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
        basis = compressor.fit(self.config, self.codec.unrotated(keys, positions), values, positions != EMPTY)
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

    def replace_page(self, place: tuple[int, int, int], page_id: Tensor) -> None:
        """Hold another page, int32 [1], whose slots are all live, at a place: sequence, KV head, number in the row."""
        old = self.table.ids[place].view(1).clone()
        self.pool.retain(page_id)
        self.table.ids[place], self.table.live[place] = page_id, all_live(self.page_size)
        self.pool.release(self.codec.form, old)
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

    def occupied(self) -> Tensor:
        """The tokens that each row takes room for, int64 [sequences, kv_heads]: a page counts whole."""
        return self.table.counts * self.page_size + self.tail.lengths

    def needs(self) -> list[int]:
        """The tokens that each sequence has seen, or takes room for if that is more."""
        return [max(seen, *rows) for seen, rows in zip(self.seen.tolist(), self.occupied().tolist(), strict=True)]

    def release(self) -> None:
        """Let go of all pages."""
        self.pool.release(self.codec.form, self.table.held())


def _padded(positions: Tensor) -> bool:
    if positions.shape[1] == 1:  # a decoded token: a list is searched sooner than two tensors are made
        return any(position < 0 for (position,) in positions.tolist())
    return bool((positions < 0).any())
