"""Low rank: of each key the few coordinates that keys of its sequence differ in."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import torch
from torch import Tensor

from pikv.adapters.compressors.rotated import check_plain
from pikv.core.basis import Basis
from pikv.core.errors import ConfigError
from pikv.core.exact import Exact
from pikv.core.ports import BasisCompressor, Compressor

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig


def _positive(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"rank must be a positive whole number of channels, got {value!r}")


@final
@attrs.frozen(kw_only=True)
class LowRank(BasisCompressor):
    """Store `rank` coordinates of each key, which `inner` may round, and values whole.

    Source: keys of a long text are near to low rank (ShadowKV, arXiv 2410.21465, section 3), there of all heads
    together and before rotary embedding; here of each KV head, after it, so that queries enter the basis once.
    The basis are the leading right singular vectors of the keys that a sequence holds when it seals its first page:
    what later keys have beside it is lost.
    """

    rank: int = attrs.field(validator=_positive)
    inner: Compressor = attrs.field(factory=Exact, validator=check_plain)

    def stored(self, layer: LayerConfig) -> LayerConfig:
        """The layer with keys of `rank` channels. Raises ConfigError for fewer, and where keys hold the values."""
        if self.rank > layer.key_dim:
            raise ConfigError(f"rank must be at most key_dim = {layer.key_dim}, got {self.rank}; lower it")
        if layer.values == "key_prefix":
            raise ConfigError("LowRank needs values that are stored: those of this layer are a prefix of its keys")
        return attrs.evolve(layer, key_dim=self.rank)

    def fit(self, layer: LayerConfig, keys: Tensor, values: Tensor, held: Tensor) -> Basis:
        """A basis for each row: float32 [sequences, kv_heads, key_dim, rank]."""
        keys = keys.double().masked_fill(~held[..., None], 0)
        axes = torch.linalg.eigh(keys.mT @ keys).eigenvectors.flip(-1)  # the singular vectors, the longest axis first
        return Basis(axes[..., : self.rank].float().contiguous())
