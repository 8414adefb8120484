"""Axes of keys that were fitted once, on a calibration text, and serve every sequence."""

from __future__ import annotations

import functools
import hashlib
import pickle
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Self, final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError


def longest_first(keys: Tensor, held: Tensor) -> Tensor:
    """The right singular vectors of keys [..., tokens, key_dim], the longest axis first: float32 [..., dim, dim].

    held: bool [..., tokens], False where there is no token.
    """
    keys = keys.double().masked_fill(~held[..., None], 0)
    return torch.linalg.eigh(keys.mT @ keys).eigenvectors.flip(-1).float()


@final
@attrs.frozen
class Axes:
    """Orthonormal axes of the keys of one layer, float32 [kv_heads, key_dim, key_dim], the longest first.

    Axes are equal where their numbers are, which is looked up by `digest`.
    """

    columns: Tensor = attrs.field(eq=False, repr=False)
    digest: str = attrs.field(init=False)

    @digest.default
    def _digest(self) -> str:
        return hashlib.sha256(array("f", self.columns.flatten().tolist()).tobytes()).hexdigest()[:16]

    def __attrs_post_init__(self) -> None:
        shape, dtype = tuple(self.columns.shape), self.columns.dtype
        if len(shape) != 3 or shape[1] != shape[2] or dtype != torch.float32:
            raise ConfigError(f"axes must be float32 [kv_heads, key_dim, key_dim], got {dtype} {list(shape)}")

    @classmethod
    def of(cls, keys: Tensor, positions: Tensor) -> Self:
        """Of the keys [sequences, kv_heads, tokens, key_dim] of a calibration text, all sequences together.

        positions: [sequences, kv_heads, tokens], below 0 where there is no token.
        """
        together = (states.transpose(0, 1).flatten(1, 2) for states in (keys, positions >= 0))
        return cls(longest_first(*together))

    def leading(self, rank: int, device: torch.device) -> Tensor:
        """The first `rank` of them: [kv_heads, key_dim, rank], memory of its own, which all who ask for it share."""
        return _leading(self, rank, device)


@functools.lru_cache(maxsize=1024)
def _leading(axes: Axes, rank: int, device: torch.device) -> Tensor:
    return axes.columns[..., :rank].to(device, copy=True, memory_format=torch.contiguous_format)


def save_axes(axes: Iterable[Axes], path: Path | str) -> None:
    """Write the axes of a model's layers to a file, which `low_rank` and `low_rank_unrotated` take by its name."""
    torch.save([each.columns for each in axes], path)


def load_axes(path: Path | str) -> tuple[Axes, ...]:
    """The axes of a model's layers. Raises ConfigError for a file that does not hold any."""
    try:
        columns = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"axes: {path} cannot be read: {error}; make it by save_axes") from error
    if not isinstance(columns, list) or not all(isinstance(each, Tensor) for each in columns):
        raise ConfigError(f"axes: {path} must hold a list of tensors, one for each layer; make it by save_axes")
    return tuple(Axes(each) for each in columns)
