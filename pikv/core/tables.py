"""Which sealed pages a row has, and which of their slots are live."""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = -1


def all_live(page_size: int) -> int:
    """The live mask, as an int64, of a page whose every slot is live."""
    return -1 if page_size == 64 else (1 << page_size) - 1


def live_slots(live: Tensor, page_size: int) -> Tensor:
    """Unpack masks int64 [...] to bool [..., page_size]."""
    return ((live[..., None] >> torch.arange(page_size, device=live.device)) & 1).bool()


def pack_slots(slots: Tensor) -> Tensor:
    """Pack bool [..., page_size] to masks int64 [...]."""
    return (slots.long() << torch.arange(slots.shape[-1], device=slots.device)).sum(-1)


@attrs.define
class PageTable:
    """The pages of each row, oldest first. It names pages; the pool holds them.

    ids: int32 [sequences, kv_heads, capacity], ABSENT past a row's count. live: int64 of the same shape, one bit a
    slot. newest: int64 of the same shape, the position of the page's last token. counts: int64 [sequences, kv_heads].
    width: the pages of the longest row, kept since a decode step asks for it often.
    """

    ids: Tensor
    live: Tensor
    newest: Tensor
    counts: Tensor
    width: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._set_counts(self.counts)

    def _set_counts(self, counts: Tensor) -> None:
        self.counts = counts
        self.width = int(counts.max()) if counts.numel() else 0

    @classmethod
    def empty(cls, sequences: int, kv_heads: int) -> PageTable:
        """A table of rows without pages."""
        return cls(
            torch.empty(sequences, kv_heads, 0, dtype=torch.int32),
            torch.empty(sequences, kv_heads, 0, dtype=torch.int64),
            torch.empty(sequences, kv_heads, 0, dtype=torch.int64),
            torch.zeros(sequences, kv_heads, dtype=torch.int64),
        )

    @property
    def nbytes(self) -> int:
        """The bytes of the table's storages."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (self.ids, self.live, self.newest, self.counts))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequences, KV heads, width."""
        sequences, kv_heads = self.counts.shape
        return sequences, kv_heads, self.width

    def held(self) -> Tensor:
        """The ids of all pages, one entry for each time that the table has a page: int32 [n]."""
        return self.ids[self.ids != ABSENT]

    def append(self, ids: Tensor, newest: Tensor, counts: Tensor, *, live: int) -> None:
        """Add counts [sequences, kv_heads] new pages to the rows.

        ids int32 [n] and newest int64 [n]: in the order of `new_pages(counts)`.
        """
        self._reserve(int((self.counts + counts).max()))
        page, sequence, head = new_pages(counts)
        place = self.counts[sequence, head] + page
        self.ids[sequence, head, place] = ids
        self.live[sequence, head, place] = live
        self.newest[sequence, head, place] = newest
        self._set_counts(self.counts + counts)

    def keep(self, kept: Tensor) -> Tensor:
        """Keep the pages marked in kept, bool [sequences, kv_heads, width]; returns the ids of those that left."""
        width = kept.shape[-1]
        present = self.ids[..., :width] != ABSENT
        left = self.ids[..., :width][~kept & present]
        kept = kept & present
        order = kept.logical_not().int().sort(dim=-1, stable=True).indices
        self._set_counts(kept.sum(-1))
        beyond = (torch.arange(width) >= self.counts[..., None])[..., : self.width]
        for name, fill in _FILLS.items():
            ordered = getattr(self, name).gather(-1, order[..., : self.width])
            setattr(self, name, ordered.masked_fill(beyond, fill))
        return left

    def select(self, index: Tensor) -> PageTable:
        """A table of the sequences at index [n]; a sequence may come several times, or not at all."""
        return PageTable(self.ids[index], self.live[index], self.newest[index], self.counts[index])

    @classmethod
    def joined(cls, tables: list[PageTable]) -> PageTable:
        """One table of the sequences of several."""
        width = max(table.width for table in tables)

        def padded(table: PageTable, name: str, fill: int) -> Tensor:
            column: Tensor = getattr(table, name)[..., :width]
            return F.pad(column, (0, width - column.shape[-1]), value=fill)

        columns = {name: torch.cat([padded(table, name, fill) for table in tables]) for name, fill in _FILLS.items()}
        return cls(**columns, counts=torch.cat([table.counts for table in tables]))

    def _reserve(self, width: int) -> None:
        """Make room for `width` pages a row; doubling, so that appending costs the same however long a row is."""
        capacity = self.ids.shape[-1]
        if width <= capacity:
            return
        more = (*self.ids.shape[:-1], max(width, 2 * capacity) - capacity)
        for name, fill in _FILLS.items():
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_full(more, fill)], dim=-1))


_FILLS = {"ids": ABSENT, "live": 0, "newest": -1}  # what stands past a row's count


def new_pages(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of the page in its row, sequence and KV head of each of counts [sequences, kv_heads] new pages.

    Ordered by page, then sequence, then head: a page of all heads lies side by side, and so do successive pages.
    """
    column = torch.arange(int(counts.max()))[:, None, None]
    page, sequence, head = torch.nonzero(column < counts, as_tuple=True)
    return page, sequence, head
