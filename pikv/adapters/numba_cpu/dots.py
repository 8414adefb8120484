"""Sums of products of bytes: codes without a sign times digits with one, four of them in each lane at once.

Folded numbers are written in whole multiples of a 16256th of the greatest of them, in two digits to base 128. One
digit alone would be too coarse where channels differ in size.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pikv.adapters.numba_cpu.affine import FOLDED, TOPS, code_sums, prepare
from pikv.adapters.numba_cpu.dense import fetch
from pikv.adapters.numba_cpu.pages import does
from pikv.adapters.numba_cpu.shape import DotField
from pikv.adapters.numba_cpu.simd import (
    INT,
    Vector,
    at,
    both_bits,
    call,
    float_at,
    lower_load,
    multiply,
    put_float,
    shift_right,
    splat,
    splat_int,
    spread,
)
from pikv.adapters.numba_cpu.tiles import Tile, load_ints, spread_rows

HIGHEST = 16256.0  # 127 * 128: the greatest number whose digits to base 128 are from -64 to 127
SMALLEST = 1e-30  # of the greatest folded number, so that none is divided by 0


def _pairs(tile: Tile) -> types.UniTuple:
    """A tile of sums for each of the two digits."""
    return types.UniTuple(Vector("i32", tile.lanes), 2 * tile.rows * tile.columns)


@intrinsic
def no_dots(typing: Any, tile: Any) -> Any:
    """Two tiles of int32 zeros, the first for the higher digit."""
    result = _pairs(tile.value)

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return context.make_tuple(
            builder, result, [ir.Constant(result.dtype.llvm, [0] * tile.value.lanes)] * result.count
        )

    return result(tile), lower


@intrinsic
def add_dots(typing: Any, tile: Any, dots: Any, digits: Any, stride: Any, codes: Any) -> Any:
    """Add the products of four codes in each lane and the four digits of each row at an address.

    stride: bytes from the digits of a row to those of the next; the lower digits of all rows follow the higher ones.
    codes: a row of the tile, four bytes in each lane.
    """
    shape = tile.value

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, dots_, digits_, stride_, codes_ = values
        made = []
        for row in range(2 * shape.rows):
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
    """The sums of the higher digits times 128, and those of the lower ones: a tile of float32."""
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
    lanes, count, half = tile.value.lanes, tile.value.width, ir.IntType(16)

    def lowered(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        parts = []
        for column in range(tile.value.columns):
            place = builder.add(values[1], ir.IntType(64)(4 * lanes * column))
            scaled = builder.fmul(lower_load(builder, place, "f32", lanes), values[2])
            parts.append(builder.trunc(_nearest_int(builder, scaled), ir.VectorType(half, lanes)))
        wide = _joined(builder, parts)
        seven = spread(builder, half(7), count)
        top = builder.ashr(builder.add(wide, spread(builder, half(64), count)), seven)
        for digit, address in ((top, values[3]), (builder.sub(wide, builder.shl(top, seven)), values[4])):
            octets = builder.trunc(digit, ir.VectorType(ir.IntType(8), count))
            builder.store(octets, at(builder, address, octets.type), align=1)
        return context.get_dummy_value()

    return types.void(tile, types.int64, factor, types.int64, types.int64), lowered


def _nearest_int(builder: Any, numbers: Any) -> Any:
    whole = ir.VectorType(INT, 16)
    everything = [numbers, ir.Constant(whole, [0] * 16), ir.IntType(16)(0xFFFF), INT(4)]
    return call(builder, "llvm.x86.avx512.mask.cvtps2dq.512", whole, everything)


def _joined(builder: Any, vectors: list[Any]) -> Any:
    """One vector of all lanes."""
    while len(vectors) > 1:
        lanes = vectors[0].type.count
        order = ir.Constant(ir.VectorType(INT, 2 * lanes), list(range(2 * lanes)))
        vectors = [builder.shuffle_vector(a, b, order) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


@does(prepare, DotField)
def make_digits(field: Any, scratch: int) -> None:
    """See prepare: writes to scratch the size of a unit of each row's lower digit, and the digits."""
    tile, rows, count = field.digits, field.rows, field.count
    for row in range(rows):
        unit = max(float_at(scratch + TOPS + 4 * row), np.float32(SMALLEST)) / np.float32(HIGHEST)
        put_float(scratch + TOPS + 4 * row, unit)
        numbers, digits = scratch + FOLDED + 4 * row * count, scratch + FOLDED + (4 * rows + row) * count
        factor = splat(tile, np.float32(1.0) / unit)
        for entry in range(0, count, tile.width):
            put_digits(tile, numbers + 4 * entry, factor, digits + entry, digits + rows * count + entry)


@does(code_sums, DotField)
def byte_sums(field: Any, page: int, ahead: int, first: int, scratch: int) -> Any:
    """See code_sums; four codes and digits are multiplied at once."""
    tile, digits = field.sums, scratch + FOLDED + 4 * field.rows * field.count
    dots = no_dots(tile)
    for word in range(field.count // field.codes_a_word):
        offset = field.codes + 4 * (word * field.width + first)
        fetch(page + offset, ahead + offset, 4 * tile.width)
        words = load_ints(tile, page + offset)
        for part in range(field.parts):
            codes = both_bits(shift_right(words, part * field.bits), splat_int(tile, field.byte_mask))
            dots = add_dots(tile, dots, digits + 4 * (word * field.parts + part), field.count, codes)
    return multiply(digits_as_float(tile, dots), spread_rows(tile, scratch + TOPS))
