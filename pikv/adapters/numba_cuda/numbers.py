"""Numbers of 16 bits in kernels, by arithmetic alone, so that the simulator computes them too."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

FLOAT16_MAX = 65504.0


@cuda.jit(device=True)
def from_float(number):
    """A float32 as it is."""
    return number


@cuda.jit(device=True)
def from_half(bits):
    """The float32 that the bits of a float16 stand for: 5 bits of exponent, 10 of fraction."""
    return _from_bits(bits, 10, 15)


@cuda.jit(device=True)
def from_bfloat(bits):
    """The float32 that the bits of a bfloat16 stand for: 8 bits of exponent, 7 of fraction."""
    return _from_bits(bits, 7, 127)


@cuda.jit(device=True)
def _from_bits(bits, fraction_bits, bias):
    magnitude = int(bits) & 0x7FFF
    exponent, fraction = magnitude >> fraction_bits, magnitude & ((1 << fraction_bits) - 1)
    if exponent == 2 * bias + 1:
        number = math.inf if fraction == 0 else math.nan
    elif exponent == 0:
        number = math.ldexp(float(fraction), 1 - bias - fraction_bits)
    else:
        number = math.ldexp(float(fraction + (1 << fraction_bits)), exponent - bias - fraction_bits)
    return np.float32(-number if int(bits) < 0 else number)


@cuda.jit(device=True)
def half_at_most(number):
    """The bits of the largest float16 that is not above a float64, minus infinity included; -0 for -0."""
    if number > FLOAT16_MAX:
        return np.int16(0x7BFF)
    if number < -FLOAT16_MAX:
        return np.int16(-0x400)
    _, exponent = math.frexp(number)
    step = max(exponent - 11, -24)  # the exponent of what the last bit is worth
    steps = math.floor(math.ldexp(number, -step))  # 11 bits at most, or 12 where the floor carries
    if steps == 0:
        return np.int16(-0x8000 if math.copysign(1.0, number) < 0.0 else 0)
    bits = ((step + 24) << 10) + abs(steps)  # the leading bit of a normal number adds 1 to the exponent
    return np.int16(bits - 0x8000 if steps < 0 else bits)


@cuda.jit(device=True)
def half_at_least(number):
    """The bits of the least float16 that is not below a float64, infinity included; -0 for -0."""
    return np.int16(int(half_at_most(-number)) ^ -0x8000)
