"""The defaults: pages that hold what was put in, a selector that keeps everything, a pool that refuses, and LRU."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import torch
from torch import Tensor

from pikv.core.forms import Arrays, Dense, Encoding, KeyPrefix, PageForm
from pikv.core.ports.compressor import FormCompressor
from pikv.core.ports.demotion import Demotion, PageUse
from pikv.core.ports.full_pool import FullPool
from pikv.core.ports.selector import TokenSelector
from pikv.core.views import TokenView

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig


@final
@attrs.frozen
class Exact(FormCompressor):
    """Store keys and values as they are, in the model's dtype."""

    def form(self, layer: LayerConfig, *, page_size: int, dtype: torch.dtype) -> PageForm:
        """Keys [key_dim, page_size], values [page_size, value_dim] if they are stored, positions int32 [page_size]."""
        arrays: Arrays = {"keys": (dtype, (layer.key_dim, page_size))}
        values: Encoding = KeyPrefix(layer.value_dim)
        if layer.values == "stored":
            values, arrays["values"] = Dense(dtype), (dtype, (page_size, layer.value_dim))
        arrays["positions"] = (torch.int32, (page_size,))
        return PageForm.packed(page_size, Dense(dtype), values, arrays)

    def encode(self, form: PageForm, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
        """Copy; keys are transposed on the way."""
        form.view(out, "keys").copy_(keys.mT)
        if not isinstance(form.values, KeyPrefix):
            form.view(out, "values").copy_(values)
        form.view(out, "positions").copy_(positions)

    def decode(self, form: PageForm, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the pages."""
        keys = form.view(pages, "keys").mT
        return keys, form.values.of(keys) if isinstance(form.values, KeyPrefix) else form.view(pages, "values")


@final
@attrs.frozen(kw_only=True)
class KeepAll(TokenSelector):
    """Evict nothing."""

    sinks: int = 0
    recent: int = 0

    def score(self, view: TokenView) -> Tensor:
        """All tokens matter the same: zeros [sequences, kv_heads, tokens]."""
        return torch.zeros(view.positions.shape, device=view.positions.device)


@final
@attrs.frozen
class Refuse(FullPool):
    """Raise PoolFullError; the caller decides what to give up."""

    def leaving(self, newest: Tensor, pages_needed: int) -> None:
        """Nothing leaves."""


@final
@attrs.frozen
class LeastRecentlyRead(Demotion):
    """Pages that have not been read for the longest time go first."""

    def warmth(self, use: PageUse) -> Tensor:
        """When each was read."""
        return use.read_at
