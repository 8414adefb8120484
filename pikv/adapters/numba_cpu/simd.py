"""Vectors of numbers in compiled code.

A vector is a Numba type whose value is an LLVM vector, so a local variable that holds one lives in a register. LLVM
lowers each operation to what the processor has: one instruction of 16 lanes with AVX-512, two of 8 with AVX2, four of
4 with Neon. Memory is named by addresses: int64, in bytes, not necessarily aligned.

Operations on vectors also take tuples of vectors, see tiles.py.
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

ELEMENTS = {"f32": ir.FloatType(), "f16": ir.HalfType(), "i32": ir.IntType(32), "i16": ir.IntType(16)}
ELEMENTS |= {"i8": ir.IntType(8)}
INT, FLOAT = ELEMENTS["i32"], ELEMENTS["f32"]


class Vector(types.Type):  # type: ignore[misc]  # numba carries no annotations
    """`lanes` numbers of one element type."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")

    @property
    def llvm(self) -> ir.VectorType:
        """The type of its values."""
        return ir.VectorType(ELEMENTS[self.element], self.lanes)


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, typ: Vector) -> None:
        super().__init__(manager, typ, typ.llvm)


@static
@attrs.frozen
class Numbers:
    """How numbers are stored: "f32", "bf16" or "f16"; itemsize in bytes."""

    name: str
    itemsize: int


# --- what the intrinsics below are made of


def at(builder: Any, address: Any, typ: ir.Type) -> Any:
    """The memory of a type at an address."""
    return builder.inttoptr(address, typ.as_pointer())


def call(builder: Any, name: str, result: ir.Type, arguments: list[Any], **flags: Any) -> Any:
    """Call a function of LLVM by its name."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments, **flags)


def spread(builder: Any, number: Any, lanes: int) -> Any:
    """The number in all lanes."""
    typ = ir.VectorType(number.type, lanes)
    first = builder.insert_element(ir.Constant(typ, ir.Undefined), number, INT(0))
    order = ir.Constant(ir.VectorType(INT, lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(typ, ir.Undefined), order)


def lower_load(builder: Any, address: Any, stored: str, lanes: int) -> Any:
    """`lanes` stored numbers as float32; a bfloat16 is the upper half of a float32."""
    halves = ir.VectorType(ELEMENTS[{"f32": "f32", "bf16": "i16", "f16": "f16"}[stored]], lanes)
    loaded = builder.load(at(builder, address, halves), align=1)
    if stored == "f32":
        return loaded
    floats = ir.VectorType(FLOAT, lanes)
    if stored == "f16":
        return builder.fpext(loaded, floats)
    wide = builder.zext(loaded, ir.VectorType(INT, lanes))
    return builder.bitcast(builder.shl(wide, spread(builder, INT(16), lanes)), floats)


def elementwise(arity: int, lower: Callable[..., Any], result: str | None = None) -> Any:
    """An intrinsic of vectors, or of tiles and vectors: a vector meets each vector of a tile.

    result: the element type of what comes out, None for that of what comes in.
    """

    def shaped(*arguments: Any) -> Any:
        tiles = [argument for argument in arguments if isinstance(argument, types.UniTuple)]
        like = tiles[0] if tiles else arguments[0]
        vector = like.dtype if tiles else like
        made = vector if result is None else Vector(result, vector.lanes)
        return (types.UniTuple(made, like.count) if tiles else made)(*arguments)

    def lowered(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        made = signature.return_type
        if not isinstance(made, types.UniTuple):
            return lower(builder, *values)
        rows = [
            [builder.extract_value(value, i) for i in range(made.count)]
            if isinstance(argument, types.UniTuple)
            else [value] * made.count
            for argument, value in zip(signature.args, values, strict=True)
        ]
        return context.make_tuple(builder, made, [lower(builder, *parts) for parts in zip(*rows, strict=True)])

    # Intrinsics have a fixed number of arguments.
    if arity == 1:
        return intrinsic(lambda typing, a: (shaped(a), lowered))
    if arity == 2:
        return intrinsic(lambda typing, a, b: (shaped(a, b), lowered))
    return intrinsic(lambda typing, a, b, c: (shaped(a, b, c), lowered))


def lower_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """A * b + c, rounded once."""
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def lower_total(builder: Any, a: Any) -> Any:
    """The sum of the lanes, pairwise."""
    name = f"llvm.vector.reduce.fadd.v{a.type.count}f32"
    return call(builder, name, FLOAT, [FLOAT(0.0), a], fastmath=("reassoc",))


def lower_highest(builder: Any, a: Any) -> Any:
    """The greatest of the lanes that are numbers."""
    return call(builder, f"llvm.vector.reduce.fmax.v{a.type.count}f32", FLOAT, [a])


def _named(name: str) -> Callable[..., Any]:
    """Lower to an intrinsic of LLVM that takes and returns vectors of float32."""
    return lambda builder, a: call(builder, f"llvm.{name}.v{a.type.count}f32", a.type, [a])


def lower_greatest(builder: Any, a: Any, b: Any) -> Any:
    """The greater of a and b in each lane, a where a is not a number."""
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


def _spread_bits(builder: Any, bits: Any, like: Any) -> Any:
    return spread(builder, builder.trunc(bits, INT), like.type.count)


# --- single vectors


@intrinsic
def load(typing: Any, tile: Any, numbers: Any, address: Any) -> Any:
    """The tile's `lanes` numbers at an address, as float32. numbers: how they are stored."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return lower_load(builder, values[2], numbers.value.name, tile.value.lanes)

    return Vector("f32", tile.value.lanes)(tile, numbers, types.int64), lower


@intrinsic
def store(typing: Any, address: Any, vector: Any) -> Any:
    """Write a vector to an address."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[1], at(builder, values[0], vector.llvm), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, vector), lower


@intrinsic
def splat(typing: Any, tile: Any, number: Any) -> Any:
    """A float32 number in each of the tile's lanes."""
    lanes = tile.value.lanes
    return Vector("f32", lanes)(tile, types.float32), lambda _, builder, __, values: spread(builder, values[1], lanes)


@intrinsic
def splat_int(typing: Any, tile: Any, number: Any) -> Any:
    """An int32 number in each of the tile's lanes."""
    lanes = tile.value.lanes
    return Vector("i32", lanes)(tile, types.int32), lambda _, builder, __, values: spread(builder, values[1], lanes)


add = elementwise(2, lambda builder, a, b: builder.fadd(a, b))
subtract = elementwise(2, lambda builder, a, b: builder.fsub(a, b))
multiply = elementwise(2, lambda builder, a, b: builder.fmul(a, b))
fma = elementwise(3, lower_fma)  # a * b + c, rounded once
greatest = elementwise(2, lower_greatest)  # a where a is not a number, so that it is not lost
nearest = elementwise(1, _named("rint"))  # to even where two are
magnitude = elementwise(1, _named("fabs"))
to_int = elementwise(1, lambda builder, a: builder.fptosi(a, ir.VectorType(INT, a.type.count)), "i32")
to_float = elementwise(1, lambda builder, a: builder.sitofp(a, ir.VectorType(FLOAT, a.type.count)), "f32")
bits_as_float = elementwise(1, lambda builder, a: builder.bitcast(a, ir.VectorType(FLOAT, a.type.count)), "f32")
add_ints = elementwise(2, lambda builder, a, b: builder.add(a, b))
both_bits = elementwise(2, lambda builder, a, b: builder.and_(a, b))
shift_left = elementwise(2, lambda builder, a, bits: builder.shl(a, _spread_bits(builder, bits, a)))
shift_right = elementwise(2, lambda builder, a, bits: builder.lshr(a, _spread_bits(builder, bits, a)))  # zeros enter


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
    return types.float32(vector), lambda _, builder, __, values: lower_total(builder, *values)


@intrinsic
def highest(typing: Any, vector: Any) -> Any:
    """The greatest of the lanes that are numbers."""
    return types.float32(vector), lambda _, builder, __, values: lower_highest(builder, *values)


# --- single numbers, and the cache


@intrinsic
def float_at(typing: Any, address: Any) -> Any:
    """The float32 at an address."""
    return types.float32(types.int64), lambda _, builder, __, values: builder.load(at(builder, values[0], FLOAT))


@intrinsic
def number_at(typing: Any, numbers: Any, address: Any) -> Any:
    """The number at an address, as float32. numbers: how it is stored."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.extract_element(lower_load(builder, values[1], numbers.value.name, 1), INT(0))

    return types.float32(numbers, types.int64), lower


@intrinsic
def int_at(typing: Any, address: Any) -> Any:
    """The int32 at an address."""
    return types.int32(types.int64), lambda _, builder, __, values: builder.load(at(builder, values[0], INT))


@intrinsic
def long_at(typing: Any, address: Any) -> Any:
    """The int64 at an address."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(at(builder, values[0], ir.IntType(64)))

    return types.int64(types.int64), lower


@intrinsic
def put_float(typing: Any, address: Any, number: Any) -> Any:
    """Write a float32 to an address."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[1], at(builder, values[0], FLOAT))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), lower


def _prefetch(locality: int) -> Any:
    @intrinsic
    def fetch(typing: Any, address: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            place = at(builder, values[0], ELEMENTS["i8"])
            call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, INT(0), INT(locality), INT(1)])
            return context.get_dummy_value()

        return types.void(types.int64), lower

    return fetch


prefetch_near = _prefetch(3)  # into the first cache
prefetch_far = _prefetch(2)  # into the second
