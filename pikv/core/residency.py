"""Residency: which pages of a pool are in its slabs and which are far; fetched, foreseen, and sent away."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import PageLostError, PoolFullError, TierError
from pikv.core.ports.demotion import Demotion, PageUse
from pikv.core.tier_stack import Arrival, TierStack
from pikv.core.tier_use import NearUse

if TYPE_CHECKING:
    from pikv.core.forms import PageForm
    from pikv.core.pool import PagePool

FAR = -1


@attrs.frozen(eq=False)
class _Coming:
    """Pages that are being fetched into slab rows which are theirs already."""

    form: PageForm
    ids: Tensor
    rows: Tensor
    arrivals: list[Arrival]
    foreseen: bool


@final
class Residency:
    """The near and the far pages of a pool that has tiers. The pool's lock is held by whoever calls.

    A page that was far keeps its copy there, so that it leaves again without being written. Far tiers therefore hold
    every page that the pool does, at most. moves: grows whenever a page gets a row or loses it.
    """

    def __init__(self, pool: PagePool, stack: TierStack, demotion: Demotion, layer_count: int) -> None:
        self._pool, self.stack, self.use = pool, stack, NearUse()
        self._demotion, self._layer_count = demotion, layer_count
        self._forms: list[PageForm] = []
        self._form_of = torch.empty(0, dtype=torch.int8)
        self._ahead, self._pinned = (torch.empty(0, dtype=torch.bool) for _ in range(2))
        self.pinned_layers: set[int] = set()
        self._layer_of, self._read_at, self._reads = (torch.empty(0, dtype=torch.int64) for _ in range(3))
        self._coming: list[_Coming] = []
        self._in_use = torch.empty(0, dtype=torch.int32)
        self._clock = 0
        self.moves = 0

    def grow(self, count: int) -> None:
        """Make room in the books for page ids below `count`."""
        self.stack.grow(count)
        for name in ("_form_of", "_ahead", "_pinned", "_layer_of", "_read_at", "_reads"):
            old: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(count - len(old))]))

    def allocated(self, form: PageForm, ids: Tensor) -> None:
        """Note new pages."""
        if form not in self._forms:
            self._forms.append(form)
        self._form_of[ids] = self._forms.index(form)
        self._read_at[ids], self._reads[ids] = self._clock, 0
        self._ahead[ids] = self._pinned[ids] = False
        self.moves += 1

    def belong(self, ids: Tensor, layer_id: int) -> None:
        """Note the layer of pages."""
        self._layer_of[ids] = layer_id

    def freed(self, ids: Tensor) -> None:
        """Forget pages that nobody holds; what is coming for them is waited for."""
        self._land(ids)
        self.stack.forget(ids)

    # --- what is in use

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While this is open, what is fetched stays near."""
        try:
            yield
        finally:
            self._in_use = self._in_use[:0]

    def pin(self, form: PageForm, ids: Tensor, layer_id: int) -> None:
        """Fetch pages int32 [n], distinct, and keep them near until `unpin`. Raises as `fetch` does, pinning none."""
        with self.reading():
            self.fetch(form, ids, layer_id)
        self._pinned[ids] = True

    def unpin(self, ids: Tensor) -> None:
        """Let pages go far again."""
        self._pinned[ids] = False

    def leases(self) -> int:
        """How many pages are in use or in flight."""
        return len(self._in_use) + sum(len(coming.ids) for coming in self._coming)

    # --- near

    def fetch(self, form: PageForm, ids: Tensor, layer_id: int) -> None:
        """Make pages int32 [n], distinct, resident: those that come are waited for, others are read now.

        Raises PoolFullError if they do not fit beside what is in use; PageLostError, TierError. Then all pages are
        where they were.
        """
        self._land(ids[:0])
        found = int((self._pool.rows(ids) != FAR).sum())
        self._land(ids)
        self._clock += 1
        far = ids[self._pool.rows(ids) == FAR]
        if len(far):
            self.make_room(form, len(far), keep=ids, layer_id=layer_id)
            self._arrive(self._ask(form, far, foreseen=False))
        self.use.used += int(self._ahead[ids].sum())
        self._ahead[ids] = False
        self.use.hits += found
        self.use.coming += len(ids) - len(far) - found
        self.use.misses += len(far)
        self._read_at[ids] = self._clock
        self._reads[ids] += 1
        self._in_use = ids

    def foresee(self, form: PageForm, ids: Tensor, layer_id: int) -> None:
        """Begin to fetch those of the pages int32 [n] that are far, if there is room beside what is in use."""
        self._land(ids[:0])
        expected = [coming.ids for coming in self._coming]
        far = ids[self._pool.rows(ids) == FAR]
        far = far[~self._among(far, torch.cat([ids[:0], *expected]))]
        if not len(far):
            return
        try:
            self.make_room(form, len(far), keep=ids, layer_id=layer_id)
        except (PoolFullError, TierError):
            return  # what is foreseen is not yet needed: when it is, the reason is given
        self._coming.append(self._ask(form, far, foreseen=True))

    def _ask(self, form: PageForm, ids: Tensor, *, foreseen: bool) -> _Coming:
        rows = self._pool.take_rows(form, len(ids))
        arrivals = self.stack.read(ids, self._pool.slab(form), rows.long(), foreseen=foreseen)
        return _Coming(form, ids, rows, arrivals, foreseen)

    def _land(self, wanted: Tensor) -> None:
        """Take in what has arrived, and wait for those of the wanted pages that come. What failed is far again."""
        due = [
            all(arrival.ticket.done() for arrival in coming.arrivals) or bool(self._among(coming.ids, wanted).any())
            for coming in self._coming
        ]
        for coming in itertools.compress(self._coming, due):
            try:
                self._arrive(coming)
            except (PageLostError, TierError):
                continue  # it is asked for again when it is needed, and the reason is given then
        self._coming = [coming for coming, over in zip(self._coming, due, strict=True) if not over]

    def _arrive(self, coming: _Coming) -> None:
        try:
            for arrival in coming.arrivals:
                arrival.wait()
        except BaseException:
            for arrival in coming.arrivals:
                arrival.settle()
            self._pool.give_rows(coming.form, coming.rows)
            raise
        self._pool.place(coming.ids, coming.rows)
        self._read_at[coming.ids] = self._clock
        if coming.foreseen:
            self._ahead[coming.ids] = True
            self.use.foreseen += len(coming.ids)
        self.moves += 1

    # --- far

    def make_room(self, form: PageForm, count: int, *, keep: Tensor, layer_id: int) -> None:
        """Send cold pages far until `count` pages of a form fit near; those of `keep` stay, and what is in use.

        Raises PoolFullError, TierError: then some pages may have a copy far, and none has moved.
        """
        missing = count * form.stride - self._pool.near_free_bytes
        if missing <= 0:
            return
        ids = self._movable(keep, layer_id)
        strides = torch.tensor([each.stride for each in self._forms])[self._form_of[ids].long()]
        enough = strides.cumsum(0) >= missing
        if not bool(enough.any()):
            raise PoolFullError(
                f"pool: {count} pages of {form.stride} bytes are needed near and {missing} bytes are missing in "
                f"capacity_bytes={self._pool.capacity_bytes} beside {len(keep)} pages in use; raise it, compose a "
                "page_selector that reads fewer, shorten the chunks of a prompt, or pin less"
            )
        leaving = ids[: int(enough.int().argmax()) + 1]
        for number, each in enumerate(self._forms):
            some = leaving[self._form_of[leaving] == number]
            dirty = some[~self.stack.holds(some)]
            if len(dirty):
                self.stack.write(dirty, self._near_bytes(each, dirty))
        for number, each in enumerate(self._forms):
            some = leaving[self._form_of[leaving] == number]
            self._pool.give_rows(each, self._pool.rows(some))
            self._pool.place(some, torch.full((len(some),), FAR, dtype=torch.int32))
        self._ahead[leaving] = False
        self.moves += 1

    def _movable(self, keep: Tensor, layer_id: int) -> Tensor:
        """The resident pages that nobody uses, coldest first: int32 [n]."""
        self._land(keep[:0])
        ids = self._pool.resident()
        ids = ids[~(self._among(ids, torch.cat([keep, self._in_use])) | self._pinned[ids])]
        if self.pinned_layers:
            ids = ids[~torch.isin(self._layer_of[ids], torch.tensor(list(self.pinned_layers)))]
        ids = ids[self._read_at[ids].argsort(stable=True)]
        use = PageUse(
            read_at=self._read_at[ids],
            reads=self._reads[ids],
            layers=self._layer_of[ids],
            now=layer_id,
            layer_count=self._layer_count,
        )
        return ids[self._demotion.warmth(use).argsort(stable=True)]

    def _among(self, ids: Tensor, others: Tensor) -> Tensor:
        """Which of ids int32 [n] are among others int32 [m]: bool [n]."""
        marked = torch.zeros(len(self._reads), dtype=torch.bool)
        marked[others] = True
        return marked[ids]

    def _near_bytes(self, form: PageForm, ids: Tensor) -> Tensor:
        slab = self._pool.slab(form)
        return slab[self._pool.rows(ids).to(slab.device).long()].cpu()

    def bytes_of(self, form: PageForm, ids: Tensor) -> Tensor:
        """The bytes of pages int32 [n] wherever they are, uint8 [n, stride] on the CPU. Moves nothing."""
        self._land(ids)
        held, back = ids.unique(return_inverse=True)
        rows = self._pool.rows(held)
        out = torch.empty(len(held), form.stride, dtype=torch.uint8)
        out[rows != FAR] = self._near_bytes(form, held[rows != FAR])
        far = held[rows == FAR]
        if len(far):
            for arrival in self.stack.read(far, out, torch.nonzero(rows == FAR).flatten(), foreseen=False):
                arrival.wait()
        return out[back]

    def whole(self, near_bytes: int, resident: Tensor) -> tuple[int, Tensor]:
        """The bytes of all pages, given those that rows take, and which there are: bool [ids], given the resident.

        What is coming has rows but is far; what is far is counted once.
        """
        coming = sum(len(coming.rows) * coming.form.stride for coming in self._coming)
        strides = torch.tensor([form.stride for form in self._forms])
        far = self.stack.stored() & ~resident
        return near_bytes - coming + int(strides[self._form_of[far].long()].sum()), resident | far
