"""Small matrices of vectors, held as tuples; their operations are unrolled.

The inner loops of attention are outer products into a tile that stays in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pikv.adapters.numba_cpu.simd import FLOAT, INT, Vector, at, lower_fma, lower_greatest, lower_load, spread
from pikv.adapters.numba_cpu.static import static


@static
@attrs.frozen
class Tile:
    """A matrix of float32 [rows, columns * lanes] in rows * columns vectors, row by row."""

    lanes: int
    rows: int
    columns: int

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.lanes * self.columns


def _rows(tile: Tile) -> types.UniTuple:
    return types.UniTuple(Vector("f32", tile.lanes), tile.rows * tile.columns)


def _row(tile: Tile) -> types.UniTuple:
    return types.UniTuple(Vector("f32", tile.lanes), tile.columns)


@intrinsic
def zeros(typing: Any, tile: Any) -> Any:
    """A tile of zeros."""
    result = _rows(tile.value)

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        vector = ir.Constant(result.dtype.llvm, [0.0] * tile.value.lanes)
        return context.make_tuple(builder, result, [vector] * result.count)

    return result(tile), lower


@intrinsic
def load_row(typing: Any, tile: Any, numbers: Any, address: Any) -> Any:
    """One row of a tile, `width` numbers at an address, as float32."""
    result, lanes = _row(tile.value), tile.value.lanes

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        step = lanes * numbers.value.itemsize
        places = [builder.add(values[2], ir.IntType(64)(step * column)) for column in range(result.count)]
        vectors = [lower_load(builder, place, numbers.value.name, lanes) for place in places]
        return context.make_tuple(builder, result, vectors)

    return result(tile, numbers, types.int64), lower


@intrinsic
def load_tile(typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    """A tile whose rows of float32 lie `stride` bytes apart from an address on."""
    result = _rows(tile.value)

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        places = _places(builder, tile.value, values[1], values[2])
        vectors = [builder.load(at(builder, place, result.dtype.llvm), align=1) for place in places]
        return context.make_tuple(builder, result, vectors)

    return result(tile, types.int64, types.int64), lower


@intrinsic
def store_tile(typing: Any, tile: Any, address: Any, stride: Any, vectors: Any) -> Any:
    """Write a tile to rows `stride` bytes apart."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        for index, place in enumerate(_places(builder, tile.value, values[1], values[2])):
            vector = builder.extract_value(values[3], index)
            builder.store(vector, at(builder, place, vector.type), align=1)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, vectors), lower


def _places(builder: Any, tile: Tile, address: Any, stride: Any) -> list[Any]:
    """The addresses of a tile's vectors."""
    long = ir.IntType(64)
    starts = [builder.add(address, builder.mul(stride, long(row))) for row in range(tile.rows)]
    return [builder.add(start, long(4 * tile.lanes * column)) for start in starts for column in range(tile.columns)]


@intrinsic
def add_outer(typing: Any, tile: Any, sums: Any, address: Any, stride: Any, row: Any) -> Any:
    """Sums + column x row: the column is the `rows` float32 that lie `stride` bytes apart from an address on."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, sums_, address_, stride_, row_ = values
        vectors = []
        for number in range(tile.value.rows):
            place = builder.add(address_, builder.mul(stride_, ir.IntType(64)(number)))
            factor = spread(builder, builder.load(at(builder, place, FLOAT), align=4), tile.value.lanes)
            for column in range(tile.value.columns):
                before = builder.extract_value(sums_, number * tile.value.columns + column)
                vectors.append(lower_fma(builder, factor, builder.extract_value(row_, column), before))
        return context.make_tuple(builder, sums, vectors)

    return sums(tile, sums, types.int64, types.int64, row), lower


@intrinsic
def add_products(typing: Any, tile: Any, sums: Any, address: Any, stride: Any, vector: Any) -> Any:
    """For tiles of one column: sums + vector * those that lie `stride` bytes apart from an address on, lane by lane."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        vectors = []
        for row, place in enumerate(_places(builder, tile.value, values[2], values[3])):
            factor = builder.load(at(builder, place, vector.llvm), align=4)
            vectors.append(lower_fma(builder, factor, values[4], builder.extract_value(values[1], row)))
        return context.make_tuple(builder, sums, vectors)

    return sums(tile, sums, types.int64, types.int64, vector), lower


@intrinsic
def load_ints(typing: Any, tile: Any, address: Any) -> Any:
    """One row of a tile, of int32."""
    result = types.UniTuple(Vector("i32", tile.value.lanes), tile.value.columns)

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        places = [builder.add(values[1], ir.IntType(64)(4 * tile.value.lanes * i)) for i in range(result.count)]
        vectors = [builder.load(at(builder, place, result.dtype.llvm), align=1) for place in places]
        return context.make_tuple(builder, result, vectors)

    return result(tile, types.int64), lower


@intrinsic
def spread_rows(typing: Any, tile: Any, address: Any) -> Any:
    """A tile whose row i is the i-th float32 from an address on, everywhere."""
    result, shape = _rows(tile.value), tile.value

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        places = [builder.add(values[1], ir.IntType(64)(4 * row)) for row in range(shape.rows)]
        numbers = [spread(builder, builder.load(at(builder, place, FLOAT)), shape.lanes) for place in places]
        return context.make_tuple(builder, result, [number for number in numbers for _ in range(shape.columns)])

    return result(tile, types.int64), lower


def _reducing(lower_two: Callable[..., Any]) -> Any:
    @intrinsic
    def put(typing: Any, tile: Any, address: Any, stride: Any, vectors: Any) -> Any:
        rows = tile.value.rows

        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            places = _places(builder, tile.value, values[1], values[2])
            for first in range(0, rows, 4):
                four = [builder.extract_value(values[3], min(first + i, rows - 1)) for i in range(4)]
                reduced = _reduce_four(builder, lower_two, four)
                for i, place in enumerate(places[first : first + 4]):
                    builder.store(builder.extract_element(reduced, INT(i)), at(builder, place, FLOAT))
            return context.get_dummy_value()

        return types.void(tile, types.int64, types.int64, vectors), lower

    return put


def _reduce_four(builder: Any, lower_two: Callable[..., Any], vectors: list[Any]) -> Any:
    """Reduce four vectors to four numbers together: a third of the instructions that one after another would take."""

    def shuffled(a: Any, b: Any, order: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(order)), order))

    def halved(a: Any, b: Any, size: int) -> Any:
        """In each four lanes the lower half of a and b, `size` at a time in turn, reduced with the upper half."""
        lanes = a.type.count
        low = [four + i + s * lanes for four in range(0, lanes, 4) for i in range(0, 2, size) for s in (0, 1)]
        order = [lane + step for lane in low for step in range(size)]
        return lower_two(builder, shuffled(a, b, order), shuffled(a, b, [lane + 2 for lane in order]))

    result = halved(halved(*vectors[:2], 1), halved(*vectors[2:], 1), 2)
    while (lanes := result.type.count) > 4:
        lower, upper = (shuffled(result, result, list(range(i, i + lanes // 2))) for i in (0, lanes // 2))
        result = lower_two(builder, lower, upper)
    return result


# For tiles of one column: write a number for each row, float32, `stride` bytes apart from an address on.
put_totals = _reducing(lambda builder, a, b: builder.fadd(a, b))
put_highest = _reducing(lower_greatest)
