"""Pages of 8, 4 or 2 bits an entry, each small group of entries with a scale and a zero of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError, InputError
from pikv.core.forms import Affine, Arrays, Encoding, KeyPrefix, PageForm
from pikv.core.ports import FormCompressor

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig

LARGEST_GROUP = 32  # KIVI, arXiv 2402.02750, section 4
_FLOAT16_MAX = torch.finfo(torch.float16).max


class KiviLayout(FormCompressor):
    """Keys per channel in groups of 32 tokens, values per token in groups of 32 channels; `bits` an entry.

    Source of the layout: KIVI, arXiv 2402.02750, section 3. `Affine` states the bytes. A page holds no more than this:
    what is decoded differs from what was encoded by at most half its group's scale, and the rounding of one float32
    sum: `|x - decoded| <= scale / 2 + 2**-23 * max(|x|, |decoded|)`.

    Groups are the largest that divide page_size or value_dim, fill whole bytes, and are no larger than 32. Values that
    are a prefix of the keys have no codes: they are what the keys decode to, and their groups those of the keys.
    Raises InputError, and writes nothing, for entries beyond float16's range.
    """

    bits: ClassVar[int]

    @final
    def form(self, layer: LayerConfig, *, page_size: int, dtype: torch.dtype) -> PageForm:
        """Raises ConfigError for a page_size or value_dim that does not fill whole bytes; any dtype is the same."""
        return affine_form(self.bits, layer, page_size)

    @final
    def encode(self, form: PageForm, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
        """See Compressor.encode; every byte of out is written, padding as 0."""
        write_pages(form, keys, values, positions, out)

    @final
    def decode(self, form: PageForm, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in float32."""
        return read_pages(form, pages)


@final
@attrs.frozen
class Int8(KiviLayout):
    """8 bits an entry; any page_size, key_dim and value_dim."""

    bits = 8


@final
@attrs.frozen
class Int4(KiviLayout):
    """4 bits an entry; value_dim must be a multiple of 2."""

    bits = 4


@final
@attrs.frozen
class Int2(KiviLayout):
    """2 bits an entry; value_dim must be a multiple of 4."""

    bits = 2


def affine_form(bits: int, layer: LayerConfig, page_size: int) -> PageForm:
    """The fields that `Affine` names, and positions."""
    keys = Affine(bits, _group("page_size", page_size, bits), "tokens", _order(layer.key_dim, bits))
    arrays, values = _fields("key", keys, layer.key_dim, page_size), _values_of(bits, layer, page_size)
    if isinstance(values, Affine):
        arrays |= _fields("value", values, page_size, layer.value_dim)
    return PageForm.packed(page_size, keys, values, arrays | {"positions": (torch.int32, (page_size,))})


def _values_of(bits: int, layer: LayerConfig, page_size: int) -> Affine | KeyPrefix:
    if layer.values == "key_prefix":
        return KeyPrefix(layer.value_dim)
    return Affine(bits, _group("value_dim", layer.value_dim, bits), "channels", _order(page_size, bits))


def _fields(side: str, encoding: Affine, rows: int, entries: int) -> Arrays:
    """The arrays of `rows` rows of codes, of `entries` entries each."""
    groups = (entries // encoding.group, rows)
    return {
        f"{side}s": (torch.uint8, _codes_shape(encoding, rows, entries)),
        f"{side}_scales": (torch.float16, groups),
        f"{side}_zeros": (torch.float16, groups),
    }


def _group(name: str, entries: int, bits: int) -> int:
    """The largest divisor of entries, no larger than LARGEST_GROUP, that fills whole bytes."""
    codes_a_byte = 8 // bits
    groups = [size for size in range(codes_a_byte, LARGEST_GROUP + 1, codes_a_byte) if entries % size == 0]
    if not groups:
        raise ConfigError(
            f"{name} must be a multiple of {codes_a_byte}, so that codes of {bits} bits fill whole bytes, got "
            f"{entries}; use more bits (Int8 takes any dimension) or Exact"
        )
    return groups[-1]


def _order(rows: int, bits: int) -> str:
    """Of codes [rows, columns]: "words", which backends read fastest, if rows fill whole words."""
    return "plain" if rows % (32 // bits) else "words"


def _codes_shape(encoding: Affine, rows: int, columns: int) -> tuple[int, ...]:
    """The bytes of rows * columns codes."""
    if encoding.order == "words":
        return (rows // encoding.codes_a_word, columns, 4)
    return (rows, columns // encoding.codes_a_byte)


def write_pages(form: PageForm, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
    """Write pages of an affine form: keys [n, page_size, key_dim], values, positions into out uint8 [n, stride]."""
    quantized = {"key": quantize("keys", keys.mT, _affine(form.keys))}
    if not isinstance(form.values, KeyPrefix):
        quantized["value"] = quantize("values", values, _affine(form.values))
    out.zero_()
    for side, (codes, scales, zeros) in quantized.items():
        form.view(out, f"{side}s").copy_(codes)
        form.view(out, f"{side}_scales").copy_(scales.mT)
        form.view(out, f"{side}_zeros").copy_(zeros.mT)
    form.view(out, "positions").copy_(positions)


def read_pages(form: PageForm, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [n, page_size, key_dim] and values [n, page_size, value_dim] in float32 of pages of an affine form."""
    keys = _read_side(form, pages, "key", form.keys).mT
    if isinstance(form.values, KeyPrefix):
        return keys, form.values.of(keys)
    return keys, _read_side(form, pages, "value", form.values)


def _read_side(form: PageForm, pages: Tensor, side: str, encoding: Encoding) -> Tensor:
    """[n, rows, entries] in float32."""
    codes, scales, zeros = (form.view(pages, f"{side}{part}") for part in ("s", "_scales", "_zeros"))
    return dequantize(codes, scales.mT, zeros.mT, _affine(encoding))


def _affine(encoding: Encoding) -> Affine:
    assert isinstance(encoding, Affine)  # the form is one that affine_form returned
    return encoding


def quantize(name: str, states: Tensor, encoding: Affine) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed codes uint8, scales and zeros float16 [..., rows, groups] of states.

    states: [..., rows, entries], called `name` in errors. Raises InputError for what float16 cannot hold, NaN included.
    """
    grouped = states.unflatten(-1, (-1, encoding.group))
    low, high = (bound.double() for bound in grouped.aminmax(dim=-1))
    if not bool(((low >= -_FLOAT16_MAX) & (high <= _FLOAT16_MAX)).all()):
        raise InputError(
            f"{name} must lie within float16's range of +-{_FLOAT16_MAX:.0f}, which their scales and zeros are stored "
            f"in, got a magnitude of {float(states.abs().amax()):.6g}; use the compressor Exact"
        )
    low, high = low + 0.0, high + 0.0  # 0.0 instead of -0.0: which of the two comes out depends on the order
    zeros = _float16_at_most(low)
    scales = -_float16_at_most(-(high - zeros.double()) / encoding.highest_code)
    divisors = scales.double().masked_fill(scales == 0, 1.0)
    # float64: a float32 quotient may fall on the wrong side of a tie, and the error be more than half a scale.
    codes = (grouped - zeros.double()[..., None]).div_(divisors[..., None]).round_()
    return _pack(codes.to(torch.uint8).flatten(-2), encoding), scales, zeros


def _float16_at_most(bound: Tensor) -> Tensor:
    """The largest float16 not above each entry of bound, which is within float16's range."""
    nearest = bound.to(torch.float16)
    pattern = nearest.view(torch.int16)  # its sign is the number's; the rest grows with the magnitude
    below = torch.where(pattern < 0, pattern + 1, pattern - 1).view(torch.float16)
    return torch.where(nearest > bound, below, nearest)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, encoding: Affine) -> Tensor:
    """Undo `quantize`: float32 [..., rows, entries]."""
    grouped = _unpack(codes, encoding).unflatten(-1, (-1, encoding.group)).to(torch.float32)
    return torch.addcmul(zeros.to(grouped)[..., None], grouped, scales.to(grouped)[..., None]).flatten(-2)


def _pack(codes: Tensor, encoding: Affine) -> Tensor:
    """Codes uint8 [..., rows, entries] in the bytes that `Affine` describes."""
    if encoding.order == "words":
        parts = codes.unflatten(-2, (-1, encoding.codes_a_byte, 4)).mT.unbind(-3)  # each [..., words, entries, 4]
    else:
        parts = codes.unflatten(-1, (-1, encoding.codes_a_byte)).unbind(-1)
    packed = parts[0].clone(memory_format=torch.contiguous_format)
    for place in range(1, encoding.codes_a_byte):
        packed |= parts[place] << (place * encoding.bits)
    return packed


def _unpack(packed: Tensor, encoding: Affine) -> Tensor:
    """Undo `_pack`."""
    shifts = range(0, 8, encoding.bits)
    parts = [(packed >> shift) & encoding.highest_code for shift in shifts]
    if encoding.order == "words":
        return torch.stack(parts, dim=-3).mT.flatten(-4, -2)  # from [..., words, part, entries, 4]
    return torch.stack(parts, dim=-1).flatten(-2)
