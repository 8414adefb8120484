"""Vectors of numbers in compiled code.

A vector is a Numba type whose value is an LLVM vector, so a local variable that holds one lives in a register. LLVM
lowers each operation to what the processor has: one instruction of 16 lanes with AVX-512, two of 8 with AVX2, four of
4 with Neon. Memory is named by addresses: int64, in bytes, not necessarily aligned.

A `Tile` is a small matrix of vectors, held as a tuple; its operations are unrolled. The inner loops of attention are
outer products into a tile that stays in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic

from pikv.adapters.numba_cpu.static import static

_ELEMENTS = {"f32": ir.FloatType(), "f16": ir.HalfType(), "i32": ir.IntType(32), "i16": ir.IntType(16)}
_ELEMENTS |= {"i8": ir.IntType(8)}
_INT, _FLOAT = _ELEMENTS["i32"], _ELEMENTS["f32"]


class Vector(types.Type):  # type: ignore[misc]  # numba carries no annotations
    """`lanes` numbers of one element type."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")

    @property
    def llvm(self) -> ir.VectorType:
        """The type of its values."""
        return ir.VectorType(_ELEMENTS[self.element], self.lanes)


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, typ: Vector) -> None:
        super().__init__(manager, typ, typ.llvm)


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


@static
@attrs.frozen
class Numbers:
    """How numbers are stored: "f32", "bf16" or "f16"; itemsize in bytes."""

    name: str
    itemsize: int


# --- what the intrinsics below are made of


def _at(builder: Any, address: Any, typ: ir.Type) -> Any:
    return builder.inttoptr(address, typ.as_pointer())


def _call(builder: Any, name: str, result: ir.Type, arguments: list[Any], **flags: Any) -> Any:
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments, **flags)


def _spread(builder: Any, number: Any, lanes: int) -> Any:
    """The number in all lanes."""
    typ = ir.VectorType(number.type, lanes)
    first = builder.insert_element(ir.Constant(typ, ir.Undefined), number, _INT(0))
    order = ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(typ, ir.Undefined), order)


def _load_f32(builder: Any, address: Any, stored: str, lanes: int) -> Any:
    """`lanes` stored numbers as float32; a bfloat16 is the upper half of a float32."""
    halves = ir.VectorType(_ELEMENTS[{"f32": "f32", "bf16": "i16", "f16": "f16"}[stored]], lanes)
    loaded = builder.load(_at(builder, address, halves), align=1)
    if stored == "f32":
        return loaded
    floats = ir.VectorType(_FLOAT, lanes)
    if stored == "f16":
        return builder.fpext(loaded, floats)
    wide = builder.zext(loaded, ir.VectorType(_INT, lanes))
    return builder.bitcast(builder.shl(wide, _spread(builder, _INT(16), lanes)), floats)


def _elementwise(arity: int, result: str | None, lower: Callable[..., Any]) -> Any:
    """An intrinsic on vectors of as many lanes each; result: its element type, None for that of the arguments."""

    def typed(first: Any) -> types.Type:
        return first if result is None else Vector(result, first.lanes)

    if arity == 1:

        @intrinsic
        def unary(typing: Any, a: Any) -> Any:
            return typed(a)(a), lambda _, builder, __, values: lower(builder, *values)

        return unary
    if arity == 2:

        @intrinsic
        def binary(typing: Any, a: Any, b: Any) -> Any:
            return typed(a)(a, b), lambda _, builder, __, values: lower(builder, *values)

        return binary

    @intrinsic
    def ternary(typing: Any, a: Any, b: Any, c: Any) -> Any:
        return typed(a)(a, b, c), lambda _, builder, __, values: lower(builder, *values)

    return ternary


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def _shift(operation: str) -> Callable[..., Any]:
    def lower(builder: Any, vector: Any, bits: Any) -> Any:
        count = _spread(builder, builder.trunc(bits, _INT), vector.type.count)
        return getattr(builder, operation)(vector, count)

    return lower


# --- single vectors


@intrinsic
def load(typing: Any, tile: Any, numbers: Any, address: Any) -> Any:
    """The tile's `lanes` numbers at an address, as float32. numbers: how they are stored."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _load_f32(builder, values[2], numbers.value.name, tile.value.lanes)

    return Vector("f32", tile.value.lanes)(tile, numbers, types.int64), lower


@intrinsic
def load_int(typing: Any, tile: Any, address: Any) -> Any:
    """The tile's `lanes` int32 at an address."""
    vector = Vector("i32", tile.value.lanes)

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_at(builder, values[1], vector.llvm), align=1)

    return vector(tile, types.int64), lower


@intrinsic
def store(typing: Any, address: Any, vector: Any) -> Any:
    """Write a vector to an address."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[1], _at(builder, values[0], vector.llvm), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, vector), lower


@intrinsic
def splat(typing: Any, tile: Any, number: Any) -> Any:
    """A number in each of the tile's lanes: float32, or int32 of a whole number."""
    whole = isinstance(number, types.Integer)

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _spread(builder, values[1], tile.value.lanes)

    return Vector("i32" if whole else "f32", tile.value.lanes)(tile, types.int32 if whole else types.float32), lower


add = _elementwise(2, None, lambda builder, a, b: builder.fadd(a, b))
subtract = _elementwise(2, None, lambda builder, a, b: builder.fsub(a, b))
multiply = _elementwise(2, None, lambda builder, a, b: builder.fmul(a, b))
fma = _elementwise(3, None, _fma)  # a * b + c, rounded once
# Where a is not a number these give a, so that it is not lost.
greatest = _elementwise(2, None, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))
nearest = _elementwise(
    1, None, lambda builder, a: _call(builder, f"llvm.rint.v{a.type.count}f32", a.type, [a])
)  # to even where two are
magnitude = _elementwise(1, None, lambda builder, a: _call(builder, f"llvm.fabs.v{a.type.count}f32", a.type, [a]))
to_int = _elementwise(1, "i32", lambda builder, a: builder.fptosi(a, ir.VectorType(_INT, a.type.count)))
to_float = _elementwise(1, "f32", lambda builder, a: builder.sitofp(a, ir.VectorType(_FLOAT, a.type.count)))
bits_as_float = _elementwise(1, "f32", lambda builder, a: builder.bitcast(a, ir.VectorType(_FLOAT, a.type.count)))
add_ints = _elementwise(2, None, lambda builder, a, b: builder.add(a, b))
subtract_ints = _elementwise(2, None, lambda builder, a, b: builder.sub(a, b))
both_bits = _elementwise(2, None, lambda builder, a, b: builder.and_(a, b))


@intrinsic
def shift_left(typing: Any, vector: Any, bits: Any) -> Any:
    """Each lane shifted up by `bits`."""
    return vector(vector, types.int64), lambda _, builder, __, values: _shift("shl")(builder, *values)


@intrinsic
def shift_right(typing: Any, vector: Any, bits: Any) -> Any:
    """Each lane shifted down by `bits`, its sign bit not repeated."""
    return vector(vector, types.int64), lambda _, builder, __, values: _shift("lshr")(builder, *values)


@intrinsic
def where_above(typing: Any, a: Any, bound: Any, b: Any, c: Any) -> Any:
    """Lanes of b where a > bound or a is not a number, else of c."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.select(builder.fcmp_unordered(">", values[0], values[1]), values[2], values[3])

    return a(a, bound, b, c), lower


@intrinsic
def any_above(typing: Any, a: Any, b: Any) -> Any:
    """Whether a > b in some lane."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        mask = ir.IntType(a.lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(builder.fcmp_ordered(">", *values), mask), mask(0))

    return types.boolean(a, b), lower


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """The sum of the lanes, pairwise."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{vector.lanes}f32"
        return _call(builder, name, _FLOAT, [_FLOAT(0.0), values[0]], fastmath=("reassoc",))

    return types.float32(vector), lower


@intrinsic
def highest(typing: Any, vector: Any) -> Any:
    """The greatest of the lanes."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _call(builder, f"llvm.vector.reduce.fmax.v{vector.lanes}f32", _FLOAT, list(values))

    return types.float32(vector), lower


# --- tiles


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
        vectors = [_load_f32(builder, place, numbers.value.name, lanes) for place in places]
        return context.make_tuple(builder, result, vectors)

    return result(tile, numbers, types.int64), lower


@intrinsic
def load_tile(typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    """A tile whose rows of float32 lie `stride` bytes apart from an address on."""
    result = _rows(tile.value)

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        places = _places(builder, tile.value, values[1], values[2])
        vectors = [builder.load(_at(builder, place, result.dtype.llvm), align=1) for place in places]
        return context.make_tuple(builder, result, vectors)

    return result(tile, types.int64, types.int64), lower


@intrinsic
def store_tile(typing: Any, tile: Any, address: Any, stride: Any, vectors: Any) -> Any:
    """Write a tile to rows `stride` bytes apart."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        for index, place in enumerate(_places(builder, tile.value, values[1], values[2])):
            vector = builder.extract_value(values[3], index)
            builder.store(vector, _at(builder, place, vector.type), align=1)
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
            factor = _spread(builder, builder.load(_at(builder, place, _FLOAT), align=4), tile.value.lanes)
            for column in range(tile.value.columns):
                before = builder.extract_value(sums_, number * tile.value.columns + column)
                vectors.append(_fma(builder, factor, builder.extract_value(row_, column), before))
        return context.make_tuple(builder, sums, vectors)

    return sums(tile, sums, types.int64, types.int64, row), lower


# --- single numbers, and the cache


@intrinsic
def float_at(typing: Any, address: Any) -> Any:
    """The float32 at an address."""
    return types.float32(types.int64), lambda _, builder, __, values: builder.load(_at(builder, values[0], _FLOAT))


@intrinsic
def int_at(typing: Any, address: Any) -> Any:
    """The int32 at an address."""
    return types.int32(types.int64), lambda _, builder, __, values: builder.load(_at(builder, values[0], _INT))


@intrinsic
def long_at(typing: Any, address: Any) -> Any:
    """The int64 at an address."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_at(builder, values[0], ir.IntType(64)))

    return types.int64(types.int64), lower


@intrinsic
def put_float(typing: Any, address: Any, number: Any) -> Any:
    """Write a float32 to an address."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[1], _at(builder, values[0], _FLOAT))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), lower


def _prefetch(locality: int) -> Any:
    @intrinsic
    def fetch(typing: Any, address: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            place = _at(builder, values[0], _ELEMENTS["i8"])
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, _INT(0), _INT(locality), _INT(1)])
            return context.get_dummy_value()

        return types.void(types.int64), lower

    return fetch


prefetch_near = _prefetch(3)  # into the first cache
prefetch_far = _prefetch(2)  # into the second
