"""The compressor port: how the tokens of a page become bytes and come back."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from pikv.core.basis import Basis
from pikv.core.forms import PageForm
from pikv.core.ports.selector import NeedsRotary

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig


class Compressor(abc.ABC):
    """A page format. Settings only; it knows no device and holds no state.

    A page is encoded once, when it is sealed, and never again: encoding twice would add up errors.
    """

    @abc.abstractmethod
    def form(self, layer: LayerConfig, *, page_size: int, dtype: torch.dtype) -> PageForm:
        """Return the layout of a page of this layer's tokens; dtype is the model's.

        Every form has a field "positions", int32 [page_size].
        """

    @abc.abstractmethod
    def encode(self, form: PageForm, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
        """Write n pages into out uint8 [n, form.stride]; changes nothing else.

        keys [n, page_size, key_dim], values [n, page_size, value_dim], positions int32 [n, page_size]. In a layer whose
        values are a key_prefix they come as a view of the keys; a form need not store them (`KeyPrefix`).
        """

    @abc.abstractmethod
    def decode(self, form: PageForm, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys [n, page_size, key_dim] and values [n, page_size, value_dim] of pages uint8 [n, form.stride].

        What comes back may be a view of the pages; the caller does not write to it.
        """


class FormCompressor(Compressor):
    """A compressor that does no more than its form says: numbers as they are, codes by the rule of `Affine`.

    Kernels may then write its pages as well as read them: fields one after another, what lies between them 0.
    """


class BasisCompressor(Compressor):
    """A compressor whose pages hold the coordinates of tokens in a Basis: rotated, or fewer of them.

    Authors write `inner`, `stored` and `fit`; pages are those of `inner`, which is given coordinates and knows no
    basis, so the kernels that serve `inner` serve these pages too. The cache holds the basis with the sequence, and
    counts its bytes.
    """

    @property
    @abc.abstractmethod
    def inner(self) -> Compressor:
        """Writes the coordinates."""

    @abc.abstractmethod
    def stored(self, layer: LayerConfig) -> LayerConfig:
        """The layer whose tokens the coordinates could be: this one, with their key_dim and value_dim.

        Raises ConfigError for a layer whose tokens cannot be written so.
        """

    @abc.abstractmethod
    def fit(self, layer: LayerConfig, keys: Tensor, values: Tensor, held: Tensor) -> Basis:
        """The basis for the pages of sequences that have none yet, from the tokens that they hold.

        keys [sequences, kv_heads, tokens, key_dim], values [..., value_dim]. held: bool [sequences, kv_heads, tokens],
        False where there is no token. A sequence may hold any number of them. The maps have memory of their own and no
        more, since it is counted. Changes nothing.
        """

    @final
    def form(self, layer: LayerConfig, *, page_size: int, dtype: torch.dtype) -> PageForm:
        """The form of `inner`, of coordinates."""
        return self.inner.form(self.stored(layer), page_size=page_size, dtype=dtype)

    @final
    def encode(self, form: PageForm, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
        """Write pages of coordinates."""
        self.inner.encode(form, keys, values, positions, out)

    @final
    def decode(self, form: PageForm, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of keys and values."""
        return self.inner.decode(form, pages)


class UnrotatedCompressor(BasisCompressor, NeedsRotary):
    """One whose basis is of keys before rotary embedding: `fit` is given those, and pages hold their coordinates.

    Core un-rotates keys by their positions before they enter the basis, and rotates them when they are read. Keys that
    turn with their position cannot meet a query in the basis, so these pages are decoded to be attended to: by the
    torch backend alone.
    """
