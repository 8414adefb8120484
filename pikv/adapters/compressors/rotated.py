"""Rotation before rounding: no channel stands out any more, so fewer bits do."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, final

import attrs
import torch
from torch import Tensor

from pikv.adapters.compressors.affine import Int4
from pikv.core.basis import Basis
from pikv.core.errors import ConfigError
from pikv.core.ports import BasisCompressor, Compressor

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig


def check_plain(instance: object, attribute: attrs.Attribute[Compressor], value: object) -> None:
    """A validator: a compressor without a basis."""
    if not isinstance(value, Compressor) or isinstance(value, BasisCompressor):
        raise ConfigError(f"inner must be a Compressor without a basis of its own, such as Int4(), got {value!r}")


@final
@attrs.frozen
class Rotated(BasisCompressor):
    """Rotate keys and values before `inner` rounds them, so that an outlier channel is shared out over all.

    Source: QuaRot, arXiv 2404.00456, section 3, with Hadamard matrices; see `rotation` for dimensions that have none.
    Scores and outputs stay the same but for the rounding. The rotation follows from the dimension: it is the same for
    all layers and sequences of a size.
    """

    inner: Compressor = attrs.field(factory=Int4, validator=check_plain)

    def stored(self, layer: LayerConfig) -> LayerConfig:
        """The same layer: no dimension changes."""
        return layer

    def fit(self, layer: LayerConfig, keys: Tensor, values: Tensor, held: Tensor) -> Basis:
        """The rotation of key_dim and that of value_dim, whatever the tokens.

        Where values are a prefix of the keys, that prefix and the rest are rotated apart, so that it stays one.
        """
        of_values = rotation(layer.value_dim).to(keys.device)
        if layer.values == "stored":
            return Basis(rotation(layer.key_dim).to(keys.device), of_values)
        return Basis(_apart(layer.value_dim, layer.key_dim).to(keys.device), of_values)


@functools.cache
def rotation(dim: int) -> Tensor:
    """An orthogonal float32 matrix [dim, dim] that spreads every channel evenly, or nearly.

    For dim = 2**a, Sylvester's Hadamard matrix over the root of dim; for dim = 2**a * m with an odd m, its Kronecker
    product with the matrix of the discrete cosine transform of m entries: no entry is above sqrt(2 / dim).
    """
    odd = dim // (dim & -dim)
    turned = _cosines(odd)
    while len(turned) < dim:
        turned = torch.cat([torch.cat([turned, turned], dim=1), torch.cat([turned, -turned], dim=1)])
    return (turned / math.sqrt(dim // odd)).float()


def _cosines(dim: int) -> Tensor:
    """The orthonormal DCT-II of dim entries, float64 [dim, dim]."""
    place = torch.arange(dim, dtype=torch.float64)
    waves = torch.cos(math.pi / dim * (place + 0.5) * place[:, None]) * math.sqrt(2 / dim)
    waves[0] /= math.sqrt(2)
    return waves


@functools.cache
def _apart(first: int, both: int) -> Tensor:
    """The rotation of the first channels, and beside it that of the rest."""
    return torch.block_diag(rotation(first), *([rotation(both - first)] if both > first else []))
