"""The selector port: which tokens stay, and which pages a query reads."""

from __future__ import annotations

import abc
import enum
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core.views import TokenView

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig


class TokenSelector(abc.ABC):
    """Say how much each token matters. Settings only.

    Authors write `score`. Top-k, ties, rounding and the two protected sets are written once, in core.
    """

    sinks: int
    """The first tokens of a sequence, kept whatever their score."""
    recent: int
    """The newest tokens of a sequence, kept whatever their score."""

    @abc.abstractmethod
    def score(self, view: TokenView) -> Tensor:
        """Return [sequences, kv_heads, tokens]; the lowest leave first. Changes nothing."""


class NeedsRotary:
    """Derived from by a part that looks at keys before rotary embedding, such as a view's `unrotated_keys`.

    It is refused for a model whose rotary is not known.
    """


class QueryTokenSelector(TokenSelector):
    """A token selector that looks at the newest queries.

    Its view has `queries` and `asked`, `attention()` and its sum `mass()`.
    """

    window: int
    """How many of the newest queries of a sequence it needs."""


class AttendedTokenSelector(TokenSelector):
    """A token selector that remembers the attention which each stored token has got.

    Authors write how new attention is folded into what is remembered, and `score` finds it in `view.attended`.
    """

    @abc.abstractmethod
    def fold(self, view: TokenView) -> Tensor:
        """Return what to remember of each token, [sequences, kv_heads, tokens], after the view's queries attended.

        view: `attended` is what was remembered before, 0 for a new token; `queries` are those of one update, all of
        them, so that `mass()` and `peak()` are the attention that they gave. Changes nothing.
        """


class SecondPassSelector(AttendedTokenSelector):
    """One that judges a prompt by a second pass over it, `PiKVCache.rehearsal`: nothing leaves before.

    The attention of the prompt itself is not folded; that of the second pass is, and that of decoding after it.
    """


class SharingTokenSelector(TokenSelector):
    """A token selector of which some layers keep the tokens that another layer keeps, and score none themselves."""

    @abc.abstractmethod
    def leader(self, layer_id: int) -> int:
        """The layer whose tokens this layer keeps: itself, or an earlier one that follows no other.

        A follower with room for more keeps the newest of the others too; with room for less, the newest of these.
        """


class IndexMeaning(enum.Enum):
    """What an index holds and how it gives a score, where backends may know better than to ask the selector."""

    OWN = "own"
    """Only the selector knows."""
    BOUNDS = "bounds"
    """float16 [2, key_dim]: below and above every key of the page as it decodes, channel by channel: the greatest
    float16 not above the least key, and the least float16 not below the greatest. The score of a page is
    `sum_d max(q_d * below_d, q_d * above_d)`, for the group's query q where it is greatest; a sum that is not a number
    counts as infinite."""
    CODES = "codes"
    """uint8 [n]: the keys of the page in codes of `bits` bits, which with P = page_size and D = key_dim are

        scales   float16  [D]
        zeros    float16  [D]
        codes    uint8    [words, P, 4]      words = ceil(D * bits / 32)

    Byte b of a token's word w holds the codes of the channels `w * 32 // bits + 4 * i + b`, i from 0 on, low bits
    first, as in the order "words" of `Affine`; of channels past D they are 0. A key is about `code * scale + zero`, and
    the log mass of a page is the log-sum-exp of the layer's scores with all its tokens."""


@attrs.frozen
class IndexForm:
    """What a page selector keeps of a page: one array. bits: of a code, where the meaning is CODES."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    meaning: IndexMeaning = IndexMeaning.OWN
    bits: int | None = None


@attrs.frozen(kw_only=True)
class PageIndex:
    """The index of the sealed pages of a layer, oldest first.

    arrays: [sequences, kv_heads, pages, *shape of the IndexForm]; present: bool [sequences, kv_heads, pages]. layer:
    whose pages these are, for what its attention does to scores beside scaling them.
    """

    arrays: Tensor
    present: Tensor
    layer: LayerConfig


class PageSelector(abc.ABC):
    """Choose the sealed pages that a query of one token reads. Evicts nothing. Settings only.

    Authors write what to keep of a page and how to score it; the newest page is read whatever its score, and the
    choice of the best is written once, in core. Prompts read everything.
    """

    pages: int
    """How many sealed pages each KV head reads, the newest included; for a mass, the most."""
    dense_layers: int
    """The first layers of the model that read everything."""

    @abc.abstractmethod
    def index_form(self, layer: LayerConfig, page_size: int) -> IndexForm:
        """Return what is kept of each page of this layer. page_size: tokens."""

    @abc.abstractmethod
    def index(self, keys: Tensor, out: Tensor) -> None:
        """Write the index of n pages into out [n, *shape]. keys: [n, page_size, key_dim], as the pages decode."""

    @abc.abstractmethod
    def score(self, index: PageIndex, query: Tensor) -> Tensor:
        """Return [sequences, kv_heads, pages], highest read first.

        query: [sequences, kv_heads, group, key_dim], times the layer's scale. Changes nothing; scores of absent pages
        do not matter.
        """


class MassSelector(PageSelector):
    """A page selector that knows how much attention each page gets, near enough.

    Authors write `log_mass` in the place of `score`. Core reads the pages that leave out the least, on the mean of the
    group's query heads, and reports how much that is: `pages` of them, or with a `mass` as few as reach it. Source of
    the latter: Twilight, arXiv 2502.02770, section 4 (top-p).
    """

    mass: float | None
    """The share of attention that is to be read, tail included; None for as many pages as there may be."""
    min_pages: int
    """The fewest pages that each KV head reads, whatever the mass."""

    @abc.abstractmethod
    def log_mass(self, index: PageIndex, query: Tensor) -> Tensor:
        """Return [sequences, kv_heads, group, pages]: the log of the sum of exp(score) over each page, estimated.

        query: [sequences, kv_heads, group, key_dim], times the layer's scale. Changes nothing; what absent pages get
        does not matter.
        """

    def score(self, index: PageIndex, query: Tensor) -> Tensor:
        """The pages' shares of the attention to them, the mean of the group: see PageSelector.score."""
        mass = self.log_mass(index, query).masked_fill(~index.present[:, :, None], -torch.inf)
        return mass.softmax(-1).mean(2)
