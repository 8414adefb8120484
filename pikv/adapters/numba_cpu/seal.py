"""Writing pages: taken from the tail, encoded and, where bounds on their keys are wanted, indexed, in one call.

The bytes are those that the form says, and so those that torch writes, whatever the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple, final

import attrs
import numba
import numpy as np
import torch
from torch import Tensor

from pikv.adapters.numba_cpu.attend import share
from pikv.adapters.numba_cpu.compiled import COMPILED, part
from pikv.adapters.numba_cpu.half import from_half, half_at_least, half_at_most, number
from pikv.adapters.numba_cpu.launch import Launch, workers_for
from pikv.adapters.numba_cpu.shape import NUMBERS
from pikv.adapters.numba_cpu.simd import Numbers
from pikv.adapters.numba_cpu.static import static
from pikv.core.forms import Affine, Dense, Encoding, PageForm
from pikv.core.ports import FormCompressor, IndexMeaning, NewPages, PageCodec, PageSelector, SealKernel
from pikv.core.tail import Tail
from pikv.core.torch_backend import index_pages

FLOAT16_MAX = 65504.0
NEAREST = 1.5 * 2.0**52  # added to a small float64 and taken away, leaves the nearest whole number, even of two
LANES = 16  # rows of scratch memory are whole vectors


class Side(NamedTuple):
    """How keys or values are written: of a page's tokens as entries of channels, or channels as entries of tokens.

    entries: neighbours along the axis that groups run along, tokens of keys and channels of values. runs: how many rows
    of entries there are. group: entries that share a scale. bits: of a code; 0 for numbers as they are, which have no
    groups. words: whether the order of codes is "words" and not "plain". codes, scales, zeros: offsets in bytes from a
    page on.
    """

    along_tokens: int
    entries: int
    runs: int
    bits: int
    group: int
    words: int
    codes: int
    scales: int
    zeros: int


@static
@attrs.frozen(kw_only=True)
class Stored:
    """What the kernel is compiled for, so that there are few: how the tail's numbers are stored.

    sources: of the kernels' source files, so that none compiled from others is taken from disk.
    """

    numbers: Numbers
    sources: int


class Source(NamedTuple):
    """The tail's arrays, [rows, capacity, ...], keys and values as bits; and which slots make page n."""

    keys: Any
    values: Any
    positions: Any
    row: Any
    slots: Any


class Scratch(NamedTuple):
    """A worker's memory: numbers float32 and codes uint8 [entries, runs], lines float64 [2, runs]."""

    numbers: Any
    codes: Any
    lines: Any


class Target(NamedTuple):
    """The new pages as uint8, int16 and int32 [n, ...], the same memory; their bounds [n or 0, 2, key_dim] as bits."""

    bytes: Any
    halves: Any
    words: Any
    bounds: Any


def sides_of(codec: PageCodec) -> tuple[Side, Side] | None:
    """How pages of this codec are written, keys and values; None for pages that the kernel does not know."""
    form, layer, dtype = codec.form, codec.layer, codec.dtype
    keys = _side(form, "keys", form.keys, (form.page_size, layer.key_dim), dtype)
    values = _side(form, "values", form.values, (layer.value_dim, form.page_size), dtype)
    if not isinstance(codec.compressor, FormCompressor) or dtype not in NUMBERS or keys is None or values is None:
        return None
    return keys, values


def _side(form: PageForm, name: str, encoding: Encoding, shape: tuple[int, int], dtype: torch.dtype) -> Side | None:
    along_tokens, (entries, runs) = int(name == "keys"), shape
    if encoding == Dense(dtype):
        bits = group = words = scales = zeros = 0
    elif isinstance(encoding, Affine) and encoding.order in ("plain", "words"):
        bits, group, words = encoding.bits, encoding.group, int(encoding.order == "words")
        scales, zeros = (form.field(f"{name[:-1]}_{part}").offset for part in ("scales", "zeros"))
    else:
        return None
    return Side(
        along_tokens=along_tokens,
        entries=entries,
        runs=runs,
        bits=bits,
        group=group,
        words=words,
        codes=form.field(name).offset,
        scales=scales,
        zeros=zeros,
    )


@final
@attrs.define
class NumbaSeal(SealKernel):
    """See SealKernel. The kernel writes an index of bounds too; for others the selector is asked."""

    stored: Stored
    sides: tuple[Side, Side]
    codec: PageCodec
    selector: PageSelector | None
    _kernel: Launch = attrs.field(factory=lambda: Launch(alone=_seal_alone, together=_seal_together), init=False)

    def __call__(self, tail: Tail, new: NewPages, out: Tensor) -> Tensor | None:
        """See SealKernel."""
        layer = self.codec.layer
        bounds = self.selector is not None and self.selector.index_form(layer).meaning is IndexMeaning.BOUNDS
        index = torch.empty(len(out) * bounds, 2, layer.key_dim, dtype=torch.float16)
        written = torch.zeros(len(out), dtype=torch.bool)
        source = Source(
            keys=_bits(tail.keys),
            values=_bits(tail.values),
            positions=tail.positions.flatten(0, 1).numpy(),
            row=(new.sequence * tail.keys.shape[1] + new.head).numpy(),
            slots=new.slots.contiguous().numpy(),
        )
        types = (torch.uint8, torch.int16, torch.int32)
        target = Target(*(out.view(dtype).numpy() for dtype in types), bounds=index.view(torch.int16).numpy())
        positions = self.codec.form.field("positions").offset
        self._kernel(
            self.stored, *self.sides, positions, source, target, written.numpy(), workers=workers_for(len(out))
        )
        if not bool(written.all()):
            self._refuse(tail, new, out, int(written.int().argmin()))
        if bounds or self.selector is None:
            return index if bounds else None
        return index_pages(self.codec, self.selector, out)

    def _refuse(self, tail: Tail, new: NewPages, out: Tensor, page: int) -> None:
        """Have the compressor say why it cannot hold a page."""
        place = (new.sequence[page], new.head[page], new.slots[page])
        keys, values, positions = (states[place][None] for states in (tail.keys, tail.values, tail.positions))
        self.codec.compressor.encode(self.codec.form, keys, values, positions, out[page : page + 1])
        raise AssertionError("the compressor holds what the kernel refused")


def _bits(states: Tensor) -> Any:
    """States [sequences, kv_heads, ...] as whole numbers of as many bits: [sequences * kv_heads, ...]."""
    return states.view(torch.int32 if states.itemsize == 4 else torch.int16).flatten(0, 1).numpy()


@numba.njit(cache=True, **COMPILED)
def _seal_alone(
    stored: Any,
    keys: Side,
    values: Side,
    positions: int,
    source: Source,
    target: Target,
    written: Any,
    workers: int,
) -> None:
    """Write pages, and mark those in written that hold what they were given. positions: their offset in a page."""
    _write_pages(stored, keys, values, positions, source, target, written, 0, len(written))


@numba.njit(parallel=True, cache=True, **COMPILED)
def _seal_together(
    stored: Any,
    keys: Side,
    values: Side,
    positions: int,
    source: Source,
    target: Target,
    written: Any,
    workers: int,
) -> None:
    """The same by several workers, each in a thread of numba's."""
    for worker in numba.prange(workers):
        first, last = share(len(written), worker, workers)
        _write_pages(stored, keys, values, positions, source, target, written, first, last)


@part
def _write_pages(
    stored: Any,
    keys: Side,
    values: Side,
    positions: int,
    source: Source,
    target: Target,
    written: Any,
    first: int,
    last: int,
) -> None:
    widest = -(-max(keys.runs, values.runs) // LANES) * LANES
    shape = max(keys.entries, values.entries), widest
    scratch = Scratch(np.empty(shape, np.float32), np.empty(shape, np.uint8), np.empty((2, widest), np.float64))
    for page in range(first, last):
        fine = _write(stored, keys, source.keys, source, target, page, scratch)
        if len(target.bounds):
            _bound(keys, target, page, scratch.numbers)
        fine &= _write(stored, values, source.values, source, target, page, scratch)
        for token in range(source.slots.shape[1]):
            position = source.positions[source.row[page], source.slots[page, token]]
            target.words[page, positions // 4 + token] = position
        written[page] = fine


@part
def _write(stored: Any, side: Side, states: Any, source: Source, target: Target, page: int, scratch: Scratch) -> bool:
    """Write keys or values. Where bounds are wanted they are left in scratch, as they decode."""
    if side.bits or len(target.bounds):
        _gather(stored, side, states, source, page, scratch.numbers)
    if side.bits:
        return _encode(side, target, page, scratch.numbers, scratch.codes, scratch.lines)
    _copy(stored, side, states, source, target, page)
    return True


@part
def _copy(stored: Any, side: Side, states: Any, source: Source, target: Target, page: int) -> None:
    """Write numbers as they are: keys channel by channel, values token by token."""
    row, tokens, channels = source.row[page], source.slots.shape[1], states.shape[2]
    first = side.codes // stored.numbers.itemsize
    for token in range(tokens):
        slot = source.slots[page, token]
        for channel in range(channels):
            place = first + (channel * tokens + token if side.along_tokens else token * channels + channel)
            if stored.numbers.itemsize == 4:
                target.words[page, place] = states[row, slot, channel]
            else:
                target.halves[page, place] = states[row, slot, channel]


@part
def _gather(stored: Any, side: Side, states: Any, source: Source, page: int, numbers: Any) -> None:
    """Read a page's tokens into numbers float32 [entries, runs]."""
    row = source.row[page]
    for token in range(source.slots.shape[1]):
        slot = source.slots[page, token]
        for channel in range(states.shape[2]):
            value = number(stored.numbers, states[row, slot, channel])
            if side.along_tokens:
                numbers[token, channel] = value
            else:
                numbers[channel, token] = value


@part
def _encode(side: Side, target: Target, page: int, numbers: Any, codes: Any, lines: Any) -> bool:
    """Write codes, scales and zeros. False for what float16 does not reach."""
    for group in range(side.entries // side.group):
        if not _limits(side, target, page, group, numbers, lines):
            return False
        for entry in range(group * side.group, (group + 1) * side.group):
            for run in range(side.runs):  # in float64: a float32 quotient may fall on the wrong side of a tie
                quotient = (np.float64(numbers[entry, run]) - lines[0, run]) / lines[1, run]
                codes[entry, run] = np.uint8(np.int32((quotient + NEAREST) - NEAREST))
            if len(target.bounds):  # they are those of what the codes stand for
                for run in range(side.runs):
                    product = np.float32(codes[entry, run]) * np.float32(lines[1, run])
                    numbers[entry, run] = product + np.float32(lines[0, run])
    _pack(side, target, page, codes)
    return True


@part
def _limits(side: Side, target: Target, page: int, group: int, numbers: Any, lines: Any) -> bool:
    """Write the scales and zeros of a group of each run, and leave them in lines [zero, divisor]."""
    first = group * side.group
    fine = True
    for run in range(side.runs):
        lines[0, run] = lines[1, run] = numbers[first, run]
    for entry in range(first, first + side.group):
        for run in range(side.runs):
            value = np.float64(numbers[entry, run])
            lines[0, run] = min(lines[0, run], value)
            lines[1, run] = max(lines[1, run], value)
            fine &= abs(value) <= FLOAT16_MAX
    if not fine:
        return False
    for run in range(side.runs):
        place = group * side.runs + run
        zero = half_at_most(lines[0, run] + 0.0)  # the sum makes 0.0 of -0.0
        lines[0, run] = from_half(zero)
        scale = half_at_most(-(lines[1, run] - lines[0, run]) / ((1 << side.bits) - 1))
        lines[1, run] = -from_half(scale) if from_half(scale) != 0 else 1.0
        target.halves[page, side.zeros // 2 + place] = zero
        target.halves[page, side.scales // 2 + place] = scale ^ np.int16(-32768)
    return True


@part
def _pack(side: Side, target: Target, page: int, codes: Any) -> None:
    """Write the codes, 8 // bits to a byte, in one of the orders that `Affine` describes."""
    per, row = 8 // side.bits, side.entries * side.bits // 8
    if side.words:
        fours = codes.view(np.int32)  # codes of four runs at a time
        for word in range(side.runs // (4 * per)):
            for entry in range(side.entries):
                packed = fours[entry, word * per]
                for part in range(1, per):
                    packed |= fours[entry, word * per + part] << (part * side.bits)
                target.words[page, side.codes // 4 + word * side.entries + entry] = packed
        return
    for run in range(side.runs):
        for place in range(row):
            byte = codes[place * per, run]
            for part in range(1, per):
                byte |= codes[place * per + part, run] << (part * side.bits)
            target.bytes[page, side.codes + run * row + place] = byte


@part
def _bound(side: Side, target: Target, page: int, numbers: Any) -> None:
    """Write the bounds on a page's keys, numbers float32 [tokens, channels], as they decode."""
    for channel in range(side.runs):
        least = greatest = numbers[0, channel]
        for token in range(1, side.entries):
            least = min(least, numbers[token, channel])
            greatest = max(greatest, numbers[token, channel])
        target.bounds[page, 0, channel] = half_at_least(-least) ^ np.int16(-32768)
        target.bounds[page, 1, channel] = half_at_least(greatest)
