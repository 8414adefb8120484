"""The basis that pages are written in: a linear map of keys and one of values, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from pikv.core.attention import accumulator


@attrs.frozen(eq=False)
class Basis:
    """Orthonormal columns by which tokens are written in other coordinates, and in fewer where there are fewer columns.

    keys: [key_dim, stored key_dim], the same for all; [kv_heads, key_dim, stored key_dim], the same for all sequences;
    or [sequences, kv_heads, key_dim, stored key_dim]; in a basis of single pages [n, key_dim, stored key_dim]. values:
    likewise of value_dim, None where values stay as they are.

    A token's coordinates are `token @ columns`. A query enters in the same way, so that its products with keys in the
    basis are those with the keys that come back from it; an output of values in the basis leaves by the transpose.
    """

    keys: Tensor
    values: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The maps that there are."""
        return (self.keys,) if self.values is None else (self.keys, self.values)

    @property
    def shared(self) -> bool:
        """Whether it is the same for all sequences."""
        return self.keys.dim() < 4

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of keys [..., tokens, key_dim] and values, in float32 at least."""
        written = values.to(accumulator(values.dtype)) if self.values is None else _times(values, self.values)
        return _times(keys, self.keys), written

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [..., tokens, key_dim] and values, in float32 at least, of their coordinates."""
        return _times(keys, self.keys.mT), values if self.values is None else _times(values, self.values.mT)

    def enter(self, query: Tensor) -> Tensor:
        """Query [..., queries, key_dim] for keys that are in the basis."""
        return _times(query, self.keys)

    def leave(self, output: Tensor) -> Tensor:
        """Output [..., queries, value_dim] of attention to values that are in the basis."""
        return output if self.values is None else _times(output, self.values.mT)

    def of_pages(self, sequence: Tensor, head: Tensor) -> Basis:
        """The basis of single pages, whose sequences and KV heads are given: int64 [n]."""
        if self.keys.dim() == 2:
            return self
        sequence, head = sequence.to(self.keys.device), head.to(self.keys.device)
        return Basis(*(columns[head] if self.shared else columns[sequence, head] for columns in self.tensors))

    def __getitem__(self, block: slice) -> Basis:
        """Of a basis of single pages, that of some of them."""
        return self if self.keys.dim() == 2 else Basis(*(columns[block] for columns in self.tensors))

    def select(self, index: Tensor) -> Basis:
        """The basis of the sequences at index int64 [n]."""
        return self if self.shared else Basis(*(columns[index.to(columns.device)] for columns in self.tensors))

    def replaced(self, where: Tensor, other: Basis) -> Basis:
        """The other basis in the sequences marked in where, bool [sequences]; both are of the same compressor."""
        if self.shared:
            return self
        chosen = where.to(self.keys.device)[:, None, None, None]
        pairs = zip(other.tensors, self.tensors, strict=True)
        return Basis(*(torch.where(chosen, new, old) for new, old in pairs))

    @classmethod
    def joined(cls, bases: Sequence[Basis]) -> Basis:
        """One basis of the sequences of several, of the same compressor."""
        if bases[0].shared:
            return bases[0]
        return cls(*(torch.cat(columns) for columns in zip(*(basis.tensors for basis in bases), strict=True)))


def _times(states: Tensor, columns: Tensor) -> Tensor:
    dtype = accumulator(states.dtype)
    return states.to(dtype) @ columns.to(dtype)
