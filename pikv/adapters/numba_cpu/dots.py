"""Sums of products of bytes: codes without a sign times digits with one, four of them in each lane at once.

Folded numbers are written in whole multiples of a 16256th of the greatest of them, in two digits to base 128. One
digit alone would be too coarse where channels differ in size; it is enough for estimates by codes that are coarser.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pikv.adapters.numba_cpu.affine import FOLDED, TOPS, add_codes, prepare
from pikv.adapters.numba_cpu.compiled import inlined, part
from pikv.adapters.numba_cpu.dense import fetch
from pikv.adapters.numba_cpu.pages import does
from pikv.adapters.numba_cpu.shape import ByteField, DotField
from pikv.adapters.numba_cpu.simd import (
    INT,
    Vector,
    at,
    both_bits,
    call,
    float_at,
    fma,
    lower_load,
    put_float,
    shift_right,
    splat,
    splat_int,
    spread,
    to_float,
)
from pikv.adapters.numba_cpu.tiles import load_ints, spread_rows

HIGHEST = 16256.0  # 127 * 128: the greatest number whose digits to base 128 are from -64 to 127
HIGHEST_BYTE = 127.0
SMALLEST = 1e-30  # of the greatest folded number, so that none is divided by 0


@intrinsic
def no_dots(typing: Any, tile: Any) -> Any:
    """A tile of int32 zeros."""
    result = types.UniTuple(Vector("i32", tile.value.lanes), tile.value.rows * tile.value.columns)

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return context.make_tuple(
            builder, result, [ir.Constant(result.dtype.llvm, [0] * tile.value.lanes)] * result.count
        )

    return result(tile), lower


@intrinsic
def add_dots(typing: Any, tile: Any, dots: Any, digits: Any, stride: Any, codes: Any) -> Any:
    """Add the products of four codes in each lane and the four digits of each row at an address.

    stride: bytes from the digits of a row to those of the next. codes: a row of the tile, four bytes in each lane.
    """
    shape = tile.value

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, dots_, digits_, stride_, codes_ = values
        made = []
        for row in range(shape.rows):
            place = builder.add(digits_, builder.mul(stride_, ir.IntType(64)(row)))
            four = spread(builder, builder.load(at(builder, place, INT), align=1), shape.lanes)
            for column in range(shape.columns):
                before = builder.extract_value(dots_, row * shape.columns + column)
                made.append(_dot(builder, before, builder.extract_value(codes_, column), four))
        return context.make_tuple(builder, dots, made)

    return dots(tile, dots, types.int64, types.int64, codes), lower


def _dot(builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    if llvmlite.binding.llvm_version_info[0] >= 22:  # from then on its arguments are of bytes
        octets = ir.VectorType(ir.IntType(8), 64)
        unsigned, signed = builder.bitcast(unsigned, octets), builder.bitcast(signed, octets)
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", sums.type, [sums, unsigned, signed])


@intrinsic
def digits_as_float(typing: Any, tile: Any, dots: Any) -> Any:
    """The sums of the higher digits times 128, and those of the lower ones: a tile of float32. dots: of both."""
    count = tile.value.rows * tile.value.columns
    result = types.UniTuple(Vector("f32", tile.value.lanes), count)

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        made = []
        for index in range(count):
            higher, lower_ = (builder.extract_value(values[1], index + part * count) for part in (0, 1))
            whole = builder.add(builder.shl(higher, spread(builder, INT(7), tile.value.lanes)), lower_)
            made.append(builder.sitofp(whole, result.dtype.llvm))
        return context.make_tuple(builder, result, made)

    return result(tile, dots), lower


@intrinsic
def put_digits(typing: Any, tile: Any, numbers: Any, factor: Any, higher: Any, lower: Any) -> Any:
    """Write the digits of a row of float32 numbers times a factor, rounded, as bytes to two addresses.

    The higher digit is the nearest, so the lower one is from -64 to 63.
    """
    lanes, columns = tile.value.lanes, tile.value.columns

    def lowered(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        parts = []
        for column in range(columns):
            place = builder.add(values[1], ir.IntType(64)(4 * lanes * column))
            parts.append(_nearest_int(builder, builder.fmul(lower_load(builder, place, "f32", lanes), values[2])))
        for digits, address in zip((_four if columns == 4 else _few)(builder, parts), values[3:], strict=True):
            builder.store(digits, at(builder, address, digits.type), align=1)
        return context.get_dummy_value()

    return types.void(tile, types.int64, factor, types.int64, types.int64), lowered


def _nearest_int(builder: Any, numbers: Any) -> Any:
    whole = ir.VectorType(INT, 16)
    everything = [numbers, ir.Constant(whole, [0] * 16), ir.IntType(16)(0xFFFF), INT(4)]
    return call(builder, "llvm.x86.avx512.mask.cvtps2dq.512", whole, everything)


def _few(builder: Any, parts: list[Any]) -> tuple[Any, Any]:
    """The digits of one or two vectors of int32."""
    count = len(parts) * parts[0].type.count
    order = ir.Constant(ir.VectorType(INT, count), list(range(count)))
    whole = builder.shuffle_vector(parts[0], parts[-1], order)
    seven = spread(builder, INT(7), count)
    higher = builder.ashr(builder.add(whole, spread(builder, INT(64), count)), seven)
    octets = ir.VectorType(ir.IntType(8), count)
    return builder.trunc(higher, octets), builder.trunc(builder.sub(whole, builder.shl(higher, seven)), octets)


def _four(builder: Any, parts: list[Any]) -> tuple[Any, Any]:
    """The digits of four vectors of int32: packed by instructions that keep quarters of vectors apart, then ordered."""
    halves, octets = ir.VectorType(ir.IntType(16), 32), ir.VectorType(ir.IntType(8), 64)
    pairs = [call(builder, "llvm.x86.avx512.packssdw.512", halves, parts[i : i + 2]) for i in (0, 2)]
    rounding, seven = (spread(builder, ir.IntType(16)(number), 32) for number in (256, 7))
    higher = [call(builder, "llvm.x86.avx512.pmul.hr.sw.512", halves, [pair, rounding]) for pair in pairs]
    lower = [builder.sub(*both) for both in zip(pairs, (builder.shl(top, seven) for top in higher), strict=True)]
    packed = [call(builder, "llvm.x86.avx512.packsswb.512", octets, digits) for digits in (higher, lower)]
    order = ir.Constant(ir.VectorType(INT, 16), [place % 4 * 4 + place // 4 for place in range(16)])
    words = [builder.bitcast(digits, ir.VectorType(INT, 16)) for digits in packed]
    ordered = [builder.shuffle_vector(word, word, order) for word in words]
    return ordered[0], ordered[1]


@intrinsic
def put_bytes(typing: Any, tile: Any, numbers: Any, factor: Any, address: Any) -> Any:
    """Write a row of float32 numbers times a factor, rounded, as bytes to an address; they are from -128 to 127."""
    lanes, columns = tile.value.lanes, tile.value.columns

    def lowered(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        for column in range(columns):
            place, target = (
                builder.add(start, ir.IntType(64)(step * lanes * column))
                for start, step in ((values[1], 4), (values[3], 1))
            )
            whole = _nearest_int(builder, builder.fmul(lower_load(builder, place, "f32", lanes), values[2]))
            octets = builder.trunc(whole, ir.VectorType(ir.IntType(8), lanes))
            builder.store(octets, at(builder, target, octets.type), align=1)
        return context.get_dummy_value()

    return types.void(tile, types.int64, factor, types.int64), lowered


@inlined
def _units(scratch: int, row: int, highest: float) -> Any:
    """How many units a row's folded numbers have to 1, the greatest being `highest`; writes the size of a unit."""
    unit = max(float_at(scratch + TOPS + 4 * row), np.float32(SMALLEST)) / np.float32(highest)
    put_float(scratch + TOPS + 4 * row, unit)
    return np.float32(1.0) / unit


@does(prepare, DotField)
def make_digits(field: Any, scratch: int) -> None:
    """See prepare: writes to scratch the size of a unit of each row's lower digit, and the digits."""
    tile, rows, count = field.digits, field.rows, field.count
    for row in range(rows):
        numbers, digits = scratch + FOLDED + 4 * row * count, scratch + FOLDED + (4 * rows + row) * count
        factor = splat(tile, _units(scratch, row, HIGHEST))
        for entry in range(0, count, tile.width):
            put_digits(tile, numbers + 4 * entry, factor, digits + entry, digits + rows * count + entry)


@does(prepare, ByteField)
def make_bytes(field: Any, scratch: int) -> None:
    """See prepare: writes to scratch the size of a unit of each row's bytes, and the bytes."""
    tile, rows, count = field.digits, field.rows, field.count
    for row in range(rows):
        numbers, octets = scratch + FOLDED + 4 * row * count, scratch + FOLDED + (4 * rows + row) * count
        factor = splat(tile, _units(scratch, row, HIGHEST_BYTE))
        for entry in range(0, count, tile.width):
            put_bytes(tile, numbers + 4 * entry, factor, octets + entry)


@does(add_codes, DotField)
def add_digits(field: Any, page: int, ahead: int, first: int, scratch: int, sums: Any) -> Any:
    """See add_codes; four codes and digits are multiplied at once."""
    dots = digits_as_float(field.sums, _dots(field, page, ahead, first, scratch))
    return fma(dots, spread_rows(field.sums, scratch + TOPS), sums)


@does(add_codes, ByteField)
def add_bytes(field: Any, page: int, ahead: int, first: int, scratch: int, sums: Any) -> Any:
    """See add_codes; four codes and bytes are multiplied at once."""
    dots = to_float(_dots(field, page, ahead, first, scratch))
    return fma(dots, spread_rows(field.sums, scratch + TOPS), sums)


@part
def _dots(field: Any, page: int, ahead: int, first: int, scratch: int) -> Any:
    """The products of codes and digits, summed up: a tile `field.dots`."""
    tile, digits = field.dots, scratch + FOLDED + 4 * field.rows * field.count
    dots = no_dots(tile)
    for word in range(field.count // field.codes_a_word):
        offset = field.codes + 4 * (word * field.width + first)
        fetch(page + offset, ahead + offset, 4 * tile.width)
        words = load_ints(tile, page + offset)
        for four in range(field.parts):
            codes = both_bits(shift_right(words, four * field.bits), splat_int(tile, field.byte_mask))
            dots = add_dots(tile, dots, digits + 4 * (word * field.parts + four), field.count, codes)
    return dots
