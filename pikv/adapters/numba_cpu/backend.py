"""The backend: which layers its kernels serve, and how torch's tensors reach them."""

from __future__ import annotations

import zlib
from pathlib import Path as File
from typing import final

import attrs
import torch

from pikv.adapters.numba_cpu.choose import NumbaChoose, bounds_of
from pikv.adapters.numba_cpu.codes import NumbaChooseByCodes, codes_of
from pikv.adapters.numba_cpu.kernel import NumbaAttend
from pikv.adapters.numba_cpu.machine import Machine, Path, machine
from pikv.adapters.numba_cpu.seal import NumbaSeal, sides_of
from pikv.adapters.numba_cpu.shape import NUMBERS, AffineField, DenseField, DotField, Field, Shape
from pikv.adapters.numba_cpu.write import Stored
from pikv.core.forms import Affine, Dense, Encoding
from pikv.core.ports import AttendKernel, Backend, ChooseKernel, MassSelector, PageCodec, PageSelector, SealKernel

LOOK_AHEAD = 16_384  # bytes, in whole pages, that memory is fetched ahead
MOST_ROWS = 8  # queries that share the reading of a page


@final
@attrs.frozen(kw_only=True)
class NumbaCpu(Backend):
    """Kernels for Dense and Affine pages on a CPU, read where they lie. path: "portable" does without AVX-512.

    None for softcaps, values that are a prefix of the keys, codes in the order "plain", and dimensions that do not fill
    vectors; torch serves these.
    """

    path: Path | None = None

    @property
    def name(self) -> str:
        """The name in `describe()`, with the vectors that are used."""
        return f"numba_cpu {machine(self.path).name}"

    def attend(self, codec: PageCodec, device: torch.device) -> AttendKernel | None:
        """A kernel for pages on the CPU whose value_dim fills whole vectors; for codes, whose key_dim does too."""
        shape = shape_of(codec, machine(self.path)) if device.type == "cpu" else None
        return None if shape is None else NumbaAttend(codec=codec, shape=shape)

    def choose(self, selector: PageSelector, codec: PageCodec, device: torch.device) -> ChooseKernel | None:
        """A kernel for an index of bounds or of codes, on the CPU, whose key_dim fills whole vectors."""
        if device.type != "cpu":
            return None
        bounds = bounds_of(selector, codec, machine(self.path), _sources())
        if bounds is not None:
            return NumbaChoose(bounds, selector.pages)
        codes = codes_of(selector, codec, machine(self.path), _sources())
        if codes is None or not isinstance(selector, MassSelector):
            return None
        return NumbaChooseByCodes(codes, selector, codec.layer.scale)

    def seal(self, codec: PageCodec, selector: PageSelector | None, device: torch.device) -> SealKernel | None:
        """A kernel for Dense and Affine pages on the CPU, if their form is all that there is to know of them."""
        sides = sides_of(codec) if device.type == "cpu" else None
        if sides is None:
            return None
        return NumbaSeal(Stored(numbers=NUMBERS[codec.dtype], sources=_sources()), sides, codec, selector)


def shape_of(codec: PageCodec, on: Machine) -> Shape | None:
    """What a kernel for these pages is compiled for; None if there is none."""
    form, layer = codec.form, codec.layer
    most = min(MOST_ROWS, on.sums // 2)
    rows = -(-layer.group // -(-layer.group // most))  # as few more than the group as can be
    keys, values = _field(codec, "key", form.keys, rows, on), _field(codec, "value", form.values, rows, on)
    if keys is None or values is None or layer.softcap is not None or layer.values != "stored":
        return None
    if form.page_size % on.lanes or layer.value_dim % on.lanes:
        return None
    return Shape(
        machine=on,
        page_size=form.page_size,
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        rows=rows,
        stride=form.stride,
        positions=form.field("positions").offset,
        ahead=max(1, round(LOOK_AHEAD / form.stride)),
        keys=keys,
        values=values,
        tail=DenseField(numbers=NUMBERS[codec.dtype], offset=0),
        sources=_sources(),
    )


def _field(codec: PageCodec, name: str, encoding: Encoding, rows: int, on: Machine) -> Field | None:
    """How keys or values are stored, if kernels know it. rows: of queries."""
    form, layer = codec.form, codec.layer
    if isinstance(encoding, Dense) and encoding.dtype in NUMBERS:
        return DenseField(numbers=NUMBERS[encoding.dtype], offset=form.field(f"{name}s").offset)
    count, width = (layer.key_dim, form.page_size) if name == "key" else (form.page_size, layer.value_dim)
    if not isinstance(encoding, Affine) or encoding.order != "words" or encoding.group % on.lanes or count % on.lanes:
        return None
    codes, scales, zeros = (form.field(f"{name}{part}").offset for part in ("s", "_scales", "_zeros"))
    field = DotField if on.dots else AffineField
    return field(
        bits=encoding.bits,
        group=encoding.group,
        codes=codes,
        scales=scales,
        zeros=zeros,
        count=count,
        width=width,
        rows=rows,
        machine=on,
    )


def _sources() -> int:
    """A number that changes with the source files of the kernels."""
    files = sorted(File(__file__).parent.glob("*.py"))
    return zlib.crc32(b"".join(file.read_bytes() for file in files))
