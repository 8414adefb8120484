"""Numbers of 16 bits in compiled code, which numba knows none of."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pikv.adapters.numba_cpu.compiled import part

_FLOAT, _HALF, _SHORT, _INT = ir.FloatType(), ir.HalfType(), ir.IntType(16), ir.IntType(32)


@intrinsic
def number(typing: Any, numbers: Any, bits: Any) -> Any:
    """The float32 that these bits stand for. numbers: how, "f32", "bf16" or "f16"."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if numbers.value.name == "f32":
            return builder.bitcast(values[1], _FLOAT)
        if numbers.value.name == "bf16":
            return builder.bitcast(builder.shl(builder.zext(values[1], _INT), _INT(16)), _FLOAT)
        return builder.fpext(builder.bitcast(values[1], _HALF), _FLOAT)

    return types.float32(numbers, bits), lower


@intrinsic
def half(typing: Any, value: Any) -> Any:
    """The bits of the float16 that is nearest to a float32."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.fptrunc(values[0], _HALF), _SHORT)

    return types.int16(types.float32), lower


@intrinsic
def from_half(typing: Any, bits: Any) -> Any:
    """The float32 that the bits of a float16 stand for."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.fpext(builder.bitcast(values[0], _HALF), _FLOAT)

    return types.float32(types.int16), lower


@part
def half_at_most(bound: Any) -> Any:
    """The bits of the largest float16 that is not above a number within float16's range."""
    bits = half(np.float32(bound))
    if from_half(bits) > bound:  # a step down: the bits of negative numbers grow with their magnitude
        return np.int16(bits + 1) if bits < 0 else np.int16(bits - 1)
    return bits


@part
def half_at_least(bound: Any) -> Any:
    """The bits of the least float16 that is not below a float32, infinity included; 0 for -0."""
    bits = half(bound)
    if bits == -32768:  # -0, from which a step up would lead down
        bits = np.int16(0)
    if from_half(bits) < bound:
        return np.int16(bits - 1) if bits < 0 else np.int16(bits + 1)
    return bits
