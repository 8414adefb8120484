"""How the bytes of a page are laid out: fields at fixed offsets in a run of fixed length."""

from __future__ import annotations

import math
from typing import Literal

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


@attrs.frozen
class Dense:
    """Numbers stored as they are, in `dtype`."""

    dtype: torch.dtype


@attrs.frozen
class Affine:
    """Unsigned codes of `bits` bits; `group` neighbours along `axis` share a scale and a zero.

    An entry is `code * scale + zero` in float32. The product is exact there (8 and 11 bits), so the sum is the only
    rounding, with a fused multiply-add or without.

    With `per = 8 // bits` codes in a byte and page_size P, keys of D = key_dim channels, whose axis is "tokens", have
    the fields

        keys          uint8    [D, P // per]      channel-major, packed along tokens
        key_scales    float16  [P // group, D]
        key_zeros     float16  [P // group, D]

    and values of D = value_dim channels, whose axis is "channels",

        values        uint8    [P, D // per]      token-major, packed along channels
        value_scales  float16  [D // group, P]
        value_zeros   float16  [D // group, P]

    Entry i of a row of codes (a token's number in a row of keys, a channel's in a row of values) is in group
    `i // group`. In the order "plain" its code is `(row[i // per] >> i % per * bits) & (2**bits - 1)`: low bits
    first. A group is whole bytes. Scales and zeros have the group first, so those of one group lie side by side:
    a group's key scales fold into the query, its value scales into the softmax weights.

    How a group is written: zero is the largest float16 that is not above its entries, scale the least float16 that is
    not below `(highest entry - zero) / (2**bits - 1)`, neither of them -0.0; a code is `(entry - zero) / scale`,
    rounded half to even; all in float64. Where the scale is 0, which makes all entries equal the zero, codes are 0.

    bits: 2, 4 or 8. order: of the codes; an order that a backend does not know is left to torch.
    """

    bits: int
    group: int
    axis: Literal["tokens", "channels"]
    order: str = "plain"

    def __attrs_post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ConfigError(f"bits must be 2, 4 or 8, so that bytes hold whole codes, got {self.bits!r}")
        if self.group < 1 or self.group % self.codes_a_byte:
            raise ConfigError(f"group must fill whole bytes of {self.codes_a_byte} codes, got {self.group!r}")
        if self.axis not in ("tokens", "channels"):
            raise ConfigError(f"axis must be 'tokens' (keys) or 'channels' (values), got {self.axis!r}")

    @property
    def codes_a_byte(self) -> int:
        """How many codes a byte holds."""
        return 8 // self.bits

    @property
    def codes_a_word(self) -> int:
        """How many codes 4 bytes hold."""
        return 32 // self.bits

    @property
    def highest_code(self) -> int:
        """2**bits - 1."""
        return (1 << self.bits) - 1


@attrs.frozen
class Opaque:
    """Bytes that only their compressor understands; every backend but torch's leaves them alone."""

    name: str


@attrs.frozen
class KeyPrefix:
    """Values that are the first `dim` channels of the keys as decoded; they have no bytes and no field."""

    dim: int

    def of(self, keys: Tensor) -> Tensor:
        """The values [..., dim] of keys [..., key_dim]: a view."""
        return keys[..., : self.dim]


@attrs.frozen
class WithOutliers:
    """Keys in an encoding of their first channels, but for `tokens` of each page, which are stored whole beside them.

    Their compressor puts them together; every backend but torch's leaves them alone.
    """

    encoding: Encoding
    tokens: int


Encoding = Dense | Affine | Opaque | KeyPrefix | WithOutliers
Arrays = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The type and shape of each array of a page, by its name."""


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
    sums of scaled key rows and outputs sums of scaled value rows, and both vectorise without a transpose. Values that
    are a prefix of the keys (`KeyPrefix`, of values only) are read from the keys.
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
        arrays: Arrays,
    ) -> PageForm:
        """Lay `arrays` out one after another in the order given, each at an aligned offset."""
        return cls(page_size=page_size, keys=keys, values=values, fields=()).followed_by(arrays, keys=keys)

    def followed_by(self, arrays: Arrays, *, keys: Encoding) -> PageForm:
        """The same with more arrays after its fields, and with keys that are encoded in all of them."""
        fields, offset = list(self.fields), self.stride
        for name, (dtype, shape) in arrays.items():
            fields.append(Field(name, dtype, shape, offset))
            offset += _aligned(fields[-1].nbytes)
        return attrs.evolve(self, keys=keys, fields=tuple(fields))

    @property
    def stride(self) -> int:
        """The bytes from one page to the next."""
        return _aligned(self.fields[-1].offset + self.fields[-1].nbytes) if self.fields else 0

    def field(self, name: str) -> Field:
        """The field with this name."""
        return next(field for field in self.fields if field.name == name)

    def view(self, pages: Tensor, name: str) -> Tensor:
        """Return a field of pages uint8 [n, stride] as a typed view [n, *shape]; nothing is copied."""
        field = self.field(name)
        run = pages[:, field.offset : field.offset + field.nbytes]
        return run.view(field.dtype).view(-1, *field.shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
