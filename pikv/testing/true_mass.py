"""The page selector that cannot be wrong: it keeps all keys. What others estimate, it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import torch
from torch import Tensor

from pikv.core.ports import IndexForm, MassSelector, PageIndex

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig


@final
@attrs.frozen(kw_only=True)
class TrueMass(MassSelector):
    """Read the pages that get the most attention. Its index is as large as the keys: for tests and comparisons."""

    pages: int
    mass: float | None = None
    min_pages: int = 1
    dense_layers: int = 0

    def index_form(self, layer: LayerConfig, page_size: int) -> IndexForm:
        """All keys: float32 [page_size, key_dim]."""
        return IndexForm(torch.float32, (page_size, layer.key_dim))

    def index(self, keys: Tensor, out: Tensor) -> None:
        """See PageSelector.index."""
        out.copy_(keys)

    def log_mass(self, index: PageIndex, query: Tensor) -> Tensor:
        """See MassSelector.log_mass."""
        scores = torch.einsum("skgd,skmpd->skgmp", query.float(), index.arrays)
        if index.layer.softcap is not None:
            scores = index.layer.softcap * torch.tanh(scores / index.layer.softcap)
        return scores.logsumexp(-1)
