"""The backend port: which kernels run on which page forms, on which device."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core.attention import Partial, accumulator
from pikv.core.basis import Basis
from pikv.core.forms import PageForm
from pikv.core.ports.compressor import BasisCompressor, Compressor, UnrotatedCompressor
from pikv.core.ports.selector import PageSelector

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig
    from pikv.core.tail import Tail


@attrs.frozen(kw_only=True)
class PageCodec:
    """A compressor together with the layer and the form that it is used for. dtype: the model's, and the tail's."""

    compressor: Compressor
    layer: LayerConfig
    form: PageForm
    dtype: torch.dtype = torch.float32

    def coordinates(self) -> PageCodec | None:
        """What a kernel is made for that works in the basis of the pages; None for pages without one."""
        if not isinstance(self.compressor, BasisCompressor):
            return None
        return attrs.evolve(self, compressor=self.compressor.inner, layer=self.compressor.stored(self.layer))

    def unrotated(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys [..., tokens, key_dim] as they enter a basis: before rotary embedding where the compressor has it so."""
        if not isinstance(self.compressor, UnrotatedCompressor):
            return keys
        assert self.layer.rotary is not None  # NeedsRotary: refused otherwise
        return self.layer.rotary.remove(keys.to(accumulator(keys.dtype)), positions)

    def read(self, keys: Tensor, values: Tensor, positions: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
        """Keys and values [..., tokens, dim] as the layer has them, of their coordinates in a basis."""
        keys, values = basis.read(keys, values)
        if isinstance(self.compressor, UnrotatedCompressor):
            assert self.layer.rotary is not None  # NeedsRotary: refused otherwise
            keys = self.layer.rotary.apply(keys, positions)
        return keys, values


@attrs.frozen(kw_only=True)
class Pages:
    """Sealed pages of one layer, where they lie.

    slab: uint8 [rows, stride]. rows: int32 [sequences, kv_heads, pages], a row of the slab; live: int64 of the same
    shape, one bit a slot, 0 where a row of the table has fewer pages than the longest.
    run: the first of the slab rows if all pages are live and lie side by side in the order [pages, sequences,
    kv_heads], else None. basis: of a BasisCompressor's pages; kernels of backends are given pages without one, and
    queries that have entered it.
    """

    slab: Tensor
    rows: Tensor
    live: Tensor
    run: int | None
    basis: Basis | None = None


class AttendKernel(abc.ABC):
    """Attention of every query to every live slot of the pages."""

    @abc.abstractmethod
    def __call__(
        self, query: Tensor, pages: Pages, *, oldest: Tensor | None = None, page_lse: Tensor | None = None
    ) -> Partial:
        """Attend query [sequences, kv_heads, queries, key_dim]; the Partial has the shape [..., queries, value_dim].

        oldest: int64 [sequences, queries], the oldest position that each query sees; None when all see everything.
        page_lse: float32 [sequences, kv_heads, queries, pages], written if given: the log-sum-exp of each page's
        scores, -inf where a query sees nothing of a page, or what its weight is less than float32 can hold beside
        that of the pages before.
        """


class StepKernel(AttendKernel):
    """A kernel that takes the tail along: all that the queries of a decoded token attend to, in one launch.

    For kernels that are no StepKernel the core attends to the tail by the oracle, and merges.
    """

    @abc.abstractmethod
    def step(self, query: Tensor, pages: Pages | None, tail: Tail, *, oldest: Tensor | None = None) -> Partial:
        """Attend query [sequences, kv_heads, queries, key_dim] to the pages, if any, and to the whole tail.

        oldest: as for pages; it holds for the tail too.
        """


@attrs.frozen(kw_only=True)
class IndexedPages:
    """The index of the sealed pages of one layer, where it lies.

    index: [page ids, *shape of the IndexForm]. ids: int32 [sequences, kv_heads, pages], rows of the index, oldest page
    first; 0 past a row's count. counts: int64 [sequences, kv_heads].
    """

    index: Tensor
    ids: Tensor
    counts: Tensor


@attrs.frozen(kw_only=True)
class Choice:
    """Which of its pages each row reads.

    columns: int64 [sequences, kv_heads, n], of which the first `reads`, int64 [sequences, kv_heads], are read, oldest
    first; those after are columns of any pages. left_out: float32 [sequences, kv_heads], the share of attention that
    goes to pages that are not read, estimated, the mean of the group; None where nothing estimates it.
    """

    columns: Tensor
    reads: Tensor
    left_out: Tensor | None = None

    def unread(self) -> Tensor:
        """Where a row has a column that it does not read: bool [sequences, kv_heads, n], on the columns' device."""
        number = torch.arange(self.columns.shape[-1], device=self.columns.device)
        return number >= self.reads.to(self.columns.device)[..., None]

    def read(self, live: Tensor) -> Tensor:
        """The live slots int64 [sequences, kv_heads, n] of the columns, none of those that a row does not read."""
        if not bool((self.reads < live.shape[-1]).any()):
            return live
        return live.masked_fill(self.unread().to(live.device), 0)


class ChooseKernel(abc.ABC):
    """The choice of a page selector, which the kernel was made for."""

    @abc.abstractmethod
    def __call__(self, query: Tensor, pages: IndexedPages, *, beside: Tensor | None = None) -> Choice:
        """Score all pages for query [sequences, kv_heads, group, key_dim], and choose each row's newest and its best.

        At most min(selector.pages, pages) columns; which of equal scores is open. beside: float32 [sequences, kv_heads,
        group], given for a MassSelector: the log-sum-exp of the scores of what is attended to beside the pages.
        """


@attrs.frozen(kw_only=True)
class NewPages:
    """Which tail slots become pages: sequence, head int64 [n], and slots int64 [n, page_size], all on the CPU.

    basis: as of `Pages`.
    """

    sequence: Tensor
    head: Tensor
    slots: Tensor
    basis: Basis | None = None


class SealKernel(abc.ABC):
    """Encoding of new pages and, for the page selector that the kernel was made for, indexing."""

    @abc.abstractmethod
    def __call__(self, tail: Tail, new: NewPages, out: Tensor) -> Tensor | None:
        """Write the pages into out uint8 [n, stride], zeros before; return their index [n, *shape], if there is one.

        Changes nothing else. Raises what the compressor raises for numbers that it cannot hold.
        """


class Backend(abc.ABC):
    """A family of kernels. Settings only."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What `describe()` calls it."""

    @abc.abstractmethod
    def attend(self, codec: PageCodec, device: torch.device) -> AttendKernel | None:
        """Return the kernel for these pages on this device, or None if there is none."""

    @abc.abstractmethod
    def choose(self, selector: PageSelector, codec: PageCodec, device: torch.device) -> ChooseKernel | None:
        """Return the kernel that chooses among these pages as this selector does, or None if there is none."""

    @abc.abstractmethod
    def seal(self, codec: PageCodec, selector: PageSelector | None, device: torch.device) -> SealKernel | None:
        """Return the kernel that writes these pages and their index, or None if there is none."""
