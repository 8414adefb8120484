"""The page pool: who holds which page, and where its bytes lie. Shared by caches, and locked."""

from __future__ import annotations

import math
import mmap
import secrets
import threading
from collections import deque
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError, PoolFullError, StateError
from pikv.core.forms import PageForm
from pikv.core.prefix_index import PrefixIndex
from pikv.core.residency import Residency
from pikv.core.slab import FreeRuns, physical_memory_bytes, reserve
from pikv.core.tier_stack import TierStack
from pikv.core.tier_use import NearUse, PoolUse

if TYPE_CHECKING:
    from pikv.core.config import ModelConfig
    from pikv.core.ports import PageCodec, PageSelector
    from pikv.core.runtime import RuntimeConfig

_FREE = -1
_NAMELESS = -1


class _FormSlab:
    """The slab of one form, with its free rows."""

    def __init__(self, form: PageForm, capacity_bytes: int, device: torch.device) -> None:
        rows = capacity_bytes // form.stride
        self.stride = form.stride
        self.memory = reserve(rows, form.stride, device)
        self.free = FreeRuns.of(rows)

    @property
    def used_bytes(self) -> int:
        """The bytes of the rows that are taken."""
        return (len(self.memory.tensor) - self.free.total) * self.stride

    def release(self, start: int, stop: int) -> None:
        """Free a run of rows and give its memory back, memory pages shared with free neighbours included."""
        whole = self.free.give(start, stop)
        first = max(whole.start * self.stride, start * self.stride - mmap.PAGESIZE)
        last = min(whole.stop * self.stride, stop * self.stride + mmap.PAGESIZE)
        self.memory.give_back(first, last)


class PagePool:
    """Pages of all caches that share it. A page is named by its id (int32); `rows` says where its bytes are.

    capacity_bytes: of the pages of all forms together; by default the machine's main memory, of which nothing is
    taken before a page is written. A pool on another device takes its capacity at once and must be told it. With tiers
    in the runtime, capacity_bytes is what lies near, and `residency` sends cold pages far and fetches them again.
    `prefixes` keeps pages of prompts for those that begin alike, as long as nobody needs their room.
    """

    def __init__(self, model: ModelConfig, runtime: RuntimeConfig, capacity_bytes: int | None = None) -> None:
        self.device = model.device
        forms = set(runtime.forms(model))
        if capacity_bytes is None:
            if self.device.type != "cpu":
                raise ConfigError(f"capacity_bytes: a pool on {self.device} must be told how much to take")
            capacity_bytes = physical_memory_bytes()
        if capacity_bytes < min(form.stride for form in forms):
            needed = min(form.stride for form in forms)
            raise ConfigError(f"capacity_bytes must hold at least one page of {needed} bytes, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self._slabs = {form: _FormSlab(form, capacity_bytes, self.device) for form in forms}
        self.residency = self._make_residency(model, runtime)
        self._indexes = self._make_indexes(model, runtime)
        self._row_of = torch.empty(0, dtype=torch.int32)
        self._references = torch.empty(0, dtype=torch.int32)
        self._names = torch.empty(0, dtype=torch.int64)
        self.prefixes = PrefixIndex(self)
        self._next_name = secrets.randbits(62)
        self._free_ids: list[int] = []
        self._used_bytes = 0
        self._lock = threading.RLock()
        self._abandoned: deque[tuple[PageForm, Tensor]] = deque()

    def _make_residency(self, model: ModelConfig, runtime: RuntimeConfig) -> Residency | None:
        if not runtime.tiers:
            return None
        stack = TierStack(runtime.tiers)
        if stack.capacity_bytes < self.capacity_bytes:
            raise ConfigError(
                f"tiers must have room for all that lies near, capacity_bytes={self.capacity_bytes}, got "
                f"{stack.capacity_bytes} bytes; give the pool less or a tier more"
            )
        return Residency(self, stack, runtime.demotion, len(model.layers))

    @property
    def total_bytes(self) -> int:
        """What the pages of all forms may take together, near and far."""
        return self.capacity_bytes if self.residency is None else self.residency.stack.capacity_bytes

    def _make_indexes(self, model: ModelConfig, runtime: RuntimeConfig) -> dict[PageForm, Tensor]:
        """For each form the index of its pages, [page ids, *shape]; memory is taken as pages are indexed."""
        if runtime.page_selector is None:
            return {}
        most_pages = self.total_bytes // min(form.stride for form in self._slabs)
        indexes = {}
        for layer, form in zip(model.layers, runtime.forms(model), strict=True):
            wanted = runtime.page_selector.index_form(layer, runtime.page_size)
            stride = math.prod(wanted.shape) * wanted.dtype.itemsize
            if form not in indexes:
                flat = reserve(most_pages, stride, self.device).tensor
                indexes[form] = flat.view(wanted.dtype).view(most_pages, *wanted.shape)
        return indexes

    def index(self, form: PageForm) -> Tensor:
        """The page selector's index of a form's pages, by page id: [page ids, *shape]."""
        return self._indexes[form]

    def index_bytes_a_page(self, form: PageForm) -> int:
        """The bytes that the page selector keeps of each page; 0 without one."""
        return self._indexes[form][0].nbytes if form in self._indexes else 0

    def locked(self) -> threading.RLock:
        """The pool's lock, for what must not be interleaved with another cache: `with pool.locked(): ...`."""
        return self._lock

    @property
    def used_bytes(self) -> int:
        """The bytes of all pages that somebody holds."""
        self._release_abandoned()
        return self._used_bytes

    def use(self) -> PoolUse:
        """What the pool holds, and what has gone through its tiers until now, if it has any."""
        residency = self.residency
        return PoolUse(
            used_bytes=self.used_bytes,
            near_bytes=self.capacity_bytes,
            near=NearUse() if residency is None else attrs.evolve(residency.use),
            tiers=() if residency is None else residency.stack.uses(),
        )

    @property
    def bytes_a_page(self) -> int:
        """The bytes that the pool's own tables take for each page."""
        return self._row_of.itemsize + self._references.itemsize + self._names.itemsize

    def slab(self, form: PageForm) -> Tensor:
        """The memory of a form's pages: uint8 [rows, stride]."""
        return self._form_slab(form).memory.tensor

    def free_pages(self, form: PageForm) -> int:
        """How many more pages of this form fit."""
        with self._lock:
            slab = self._form_slab(form)
            room = (self.total_bytes - self.used_bytes) // slab.stride
            return min(slab.free.total, room) if self.residency is None else room

    @property
    def near_free_bytes(self) -> int:
        """How much more fits near."""
        return self.capacity_bytes - sum(slab.used_bytes for slab in self._slabs.values())

    def allocate(self, form: PageForm, count: int) -> Tensor:
        """Take `count` pages, side by side if there is such a run: int32 ids, each held once.

        Raises PoolFullError and takes nothing when they do not fit.
        """
        with self._lock:
            self.prefixes.free(count * form.stride - (self.total_bytes - self.used_bytes))
            room = self.free_pages(form)
            if count > room:
                raise PoolFullError(
                    f"pool: {count} pages of {form.stride} bytes are needed and {room} are left of "
                    f"capacity_bytes={self.capacity_bytes}; raise it, give the layers a budget_tokens, drop "
                    "sequences, or compose when_full=EvictOldest()"
                )
            self.make_near(form, count)
            rows, ids = self.take_rows(form, count), self._new_ids(count)
            self._row_of[ids] = rows
            self._references[ids] = 1
            self._used_bytes += count * form.stride
            if self.residency is not None:
                self.residency.allocated(form, ids)
            return ids

    def make_near(self, form: PageForm, count: int) -> None:
        """See that `count` pages of a form fit near, by sending others far; nothing without tiers.

        Raises PoolFullError, TierError.
        """
        if self.residency is not None:
            self.residency.make_room(form, count, keep=torch.empty(0, dtype=torch.int32), layer_id=0)

    def take_rows(self, form: PageForm, count: int) -> Tensor:
        """Take free rows of a form's slab, of which there are enough: int32 [count]."""
        runs = self._form_slab(form).free.take(count)
        rows = [torch.arange(run.start, run.stop, dtype=torch.int32) for run in runs]
        return torch.cat([torch.empty(0, dtype=torch.int32), *rows])

    def give_rows(self, form: PageForm, rows: Tensor) -> None:
        """Free rows int32 [n] of a form's slab."""
        slab, rows = self._form_slab(form), rows.sort().values
        breaks = torch.nonzero(rows.diff() != 1).flatten() + 1
        for run in torch.tensor_split(rows, breaks.tolist()):
            if len(run):
                slab.release(int(run[0]), int(run[-1]) + 1)

    def place(self, ids: Tensor, rows: Tensor) -> None:
        """Say in which rows pages int32 [n] lie now; -1 for far ones."""
        self._row_of[ids] = rows

    def resident(self) -> Tensor:
        """The ids of all pages that lie near: int32 [n]."""
        return torch.nonzero(self._row_of >= 0).flatten().int()

    def bytes_of(self, form: PageForm, ids: Tensor) -> Tensor:
        """The bytes of pages int32 [n], near and far: uint8 [n, stride] on the pool's device."""
        with self._lock:
            if self.residency is not None:
                return self.residency.bytes_of(form, ids).to(self.device)
            return self.slab(form)[self._row_of[ids].to(self.device).long()]

    def freed_by(self, ids: Tensor) -> int:
        """How many pages would be free if each of these ids were released once."""
        held, times = ids.unique(return_counts=True)
        return int((self._references[held] == times).sum())

    def rows(self, ids: Tensor) -> Tensor:
        """The slab rows of pages: int32, the shape of ids."""
        return self._row_of[ids]

    def names(self, ids: Tensor) -> Tensor:
        """The names of pages, int64, the shape of ids: for as long as they live, in any store; below 0 before any."""
        return self._names[ids]

    def name_new(self, ids: Tensor) -> None:
        """Give names to those of the pages int32 [n], distinct, that have none, in this order.

        The first name of a pool is a random number, so that pools, wherever they are, do not give the same.
        """
        with self._lock:
            nameless = ids[self._names[ids] == _NAMELESS]
            self._names[nameless] = self._next_name + torch.arange(len(nameless))
            self._next_name += len(nameless)

    def name(self, ids: Tensor, names: Tensor) -> None:
        """Give pages int32 [n] the names int64 [n] that they have in a store."""
        with self._lock:
            self._names[ids] = names

    def retain(self, ids: Tensor) -> None:
        """Hold pages once more; an id that comes twice is held twice."""
        with self._lock:
            self._references.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def release(self, form: PageForm, ids: Tensor) -> None:
        """Let go of pages of one form, once for each time an id is given; those that nobody holds are freed."""
        with self._lock:
            self._references.index_add_(0, ids, torch.full_like(ids, -1, dtype=torch.int32))
            freed = ids[self._references[ids] == 0].unique()
            if not len(freed):
                return
            if self.residency is not None:
                self.residency.freed(freed)
            rows = self._row_of[freed]
            self.give_rows(form, rows[rows >= 0])
            self._row_of[freed] = _FREE
            self._names[freed] = _NAMELESS
            self._free_ids.extend(reversed(freed.tolist()))
            self._used_bytes -= len(freed) * form.stride

    def release_later(self, form: PageForm, ids: Tensor) -> None:
        """Release pages before room is next needed. Takes no lock: safe wherever a garbage collector may run."""
        self._abandoned.append((form, ids))

    def _release_abandoned(self) -> None:
        while self._abandoned:
            with self._lock:
                self.release(*self._abandoned.popleft())

    def check_serves(self, codec: PageCodec, page_selector: PageSelector | None) -> None:
        """Raise ConfigError unless the pool has pages of the codec's form, indexed as the page selector wants."""
        self._form_slab(codec.form)
        if page_selector is not None:
            wanted = page_selector.index_form(codec.layer, codec.form.page_size)
            index = self._indexes.get(codec.form)
            if index is None or (index.dtype, index.shape[1:]) != (wanted.dtype, wanted.shape):
                raise ConfigError(
                    f"pool: it keeps no index as {type(page_selector).__name__} needs it; build it from the same model "
                    "and runtime as the cache"
                )

    def check_integrity(self) -> None:
        """Raise StateError unless every page is in exactly one place and the bytes add up."""
        self._release_abandoned()
        with self._lock:
            held = self._references > 0
            shared = self.prefixes.held()
            caches = self._references.index_add(0, shared, -torch.ones_like(shared))
            used = sum(slab.used_bytes for slab in self._slabs.values())
            there = self._row_of != _FREE
            if self.residency is not None:
                used, there = self.residency.whole(used, there)
            if used != self._used_bytes or not torch.equal(held, there) or bool((caches < 0).any()):
                raise StateError(
                    f"pool: {self._used_bytes} bytes are held, the slabs have {used} in use, "
                    f"{int(held.sum())} pages are held; this is a defect of PiKV, please report it"
                )

    def _form_slab(self, form: PageForm) -> _FormSlab:
        if form not in self._slabs:
            raise ConfigError(
                "pool: it has no pages of this form; build it from the same model and runtime as the cache"
            )
        return self._slabs[form]

    def _new_ids(self, count: int) -> Tensor:
        missing = count - len(self._free_ids)
        if missing > 0:
            old = len(self._row_of)
            new = old + max(missing, old)
            grown = torch.full((new - old,), _FREE, dtype=torch.int32)
            self._row_of = torch.cat([self._row_of, grown])
            self._references = torch.cat([self._references, torch.zeros_like(grown)])
            self._names = torch.cat([self._names, torch.full_like(grown, _NAMELESS, dtype=torch.int64)])
            if self.residency is not None:
                self.residency.grow(new)
            self._free_ids[:0] = range(new - 1, old - 1, -1)
        ids = self._free_ids[len(self._free_ids) - count :]
        del self._free_ids[len(self._free_ids) - count :]
        return torch.tensor(ids[::-1], dtype=torch.int32)
