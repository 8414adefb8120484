"""How the bytes of a page are laid out: fields at fixed offsets in a run of fixed length."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


@attrs.frozen
class Dense:
    """Numbers stored as they are, in `dtype`."""

    dtype: torch.dtype


@attrs.frozen
class Opaque:
    """Bytes that only their compressor understands; every backend but torch's leaves them alone."""

    name: str


Encoding = Dense | Opaque


@attrs.frozen
class Field:
    """A named array inside a page, at `offset` bytes from its start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """The bytes of the array, padding not included."""
        return math.prod(self.shape) * self.dtype.itemsize


@attrs.frozen(kw_only=True)
class PageForm:
    """The bytes of one page: how keys and values are encoded, and where each field lies.

    Keys are channel-major `[key_dim, page_size]` and values token-major `[page_size, value_dim]`: scores are then
    sums of scaled key rows and outputs sums of scaled value rows, and both vectorise without a transpose.
    """

    page_size: int
    keys: Encoding
    values: Encoding
    fields: tuple[Field, ...]

    @classmethod
    def packed(
        cls,
        page_size: int,
        keys: Encoding,
        values: Encoding,
        arrays: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    ) -> PageForm:
        """Lay `arrays` out one after another in the order given, each at an aligned offset."""
        fields, offset = [], 0
        for name, (dtype, shape) in arrays.items():
            fields.append(Field(name, dtype, shape, offset))
            offset += _aligned(fields[-1].nbytes)
        return cls(page_size=page_size, keys=keys, values=values, fields=tuple(fields))

    @property
    def stride(self) -> int:
        """The bytes from one page to the next."""
        return _aligned(self.fields[-1].offset + self.fields[-1].nbytes)

    def view(self, pages: Tensor, name: str) -> Tensor:
        """Return a field of pages uint8 [n, stride] as a typed view [n, *shape]; nothing is copied."""
        field = next(field for field in self.fields if field.name == name)
        run = pages[:, field.offset : field.offset + field.nbytes]
        return run.view(field.dtype).view(-1, *field.shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
