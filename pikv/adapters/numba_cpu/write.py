"""How pages are written in compiled code: gathered from the tail, encoded, and bounds on their keys beside them."""

from __future__ import annotations

from typing import Any, NamedTuple

import attrs
import numba
import numpy as np

from pikv.adapters.numba_cpu.attend import share
from pikv.adapters.numba_cpu.compiled import COMPILED, part
from pikv.adapters.numba_cpu.half import from_half, half_at_least, half_at_most, number
from pikv.adapters.numba_cpu.simd import Numbers
from pikv.adapters.numba_cpu.static import static

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


@numba.njit(cache=True, **COMPILED)
def write_alone(
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
def write_together(
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
        scale = half_at_most(-(lines[1, run] + 0.0 - lines[0, run]) / ((1 << side.bits) - 1))
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
