"""Sums of products of bytes: codes without a sign times digits with one, four of them in each lane at once."""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pikv.adapters.numba_cpu.simd import INT, Vector, at, call, lower_load, spread
from pikv.adapters.numba_cpu.tiles import Tile

HIGHEST = 16256.0  # 127 * 128: the greatest number whose digits to base 128 are from -64 to 127
DIGITS = 32  # numbers whose digits are written at once


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
def put_digits(typing: Any, line: Any, numbers: Any, factor: Any, higher: Any, lower: Any) -> Any:
    """Write the digits to base 128 of DIGITS float32 numbers times a factor, rounded, as bytes to two addresses.

    The higher digit is the nearest, so the lower one is from -64 to 63.
    """
    lanes = line.value.lanes
    count, half = DIGITS // lanes, ir.IntType(16)

    def lowered(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        parts = []
        for index in range(count):
            place = builder.add(values[1], ir.IntType(64)(4 * lanes * index))
            scaled = builder.fmul(lower_load(builder, place, "f32", lanes), values[2])
            parts.append(_nearest_int(builder, scaled))
        wide = _joined(builder, [builder.trunc(part, ir.VectorType(half, lanes)) for part in parts])
        seven, rest = spread(builder, half(7), DIGITS), spread(builder, half(64), DIGITS)
        top = builder.ashr(builder.add(wide, rest), seven)
        bottom = builder.sub(wide, builder.shl(top, seven))
        for digit, address in ((top, values[3]), (bottom, values[4])):
            octets = builder.trunc(digit, ir.VectorType(ir.IntType(8), DIGITS))
            builder.store(octets, at(builder, address, octets.type), align=1)
        return context.get_dummy_value()

    return types.void(line, types.int64, factor, types.int64, types.int64), lowered


def _nearest_int(builder: Any, numbers: Any) -> Any:
    everything = [numbers, ir.Constant(ir.VectorType(INT, 16), [0] * 16), ir.IntType(16)(0xFFFF), INT(4)]
    return call(builder, "llvm.x86.avx512.mask.cvtps2dq.512", ir.VectorType(INT, 16), everything)


def _joined(builder: Any, vectors: list[Any]) -> Any:
    first, second = vectors
    order = ir.Constant(ir.VectorType(INT, 2 * first.type.count), list(range(2 * first.type.count)))
    return builder.shuffle_vector(first, second, order)
