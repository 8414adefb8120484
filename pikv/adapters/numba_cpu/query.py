"""Queries as kernels want them: float32, scaled, and as many as fill whole blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from pikv.adapters.numba_cpu.compiled import part
from pikv.adapters.numba_cpu.shape import BFLOAT, FLOAT, HALF, Call
from pikv.adapters.numba_cpu.simd import load, multiply, number_at, put_float, splat, store

KINDS = (FLOAT, BFLOAT, HALF)  # by `Call.query_kind`


@part
def scale_queries(shape: Any, call: Call, scale: float, row: int, scaled: int) -> None:
    """Write a table row's queries times the scale, and zeros up to `padded`."""
    if call.query_kind == 0:
        _scale(shape, call, FLOAT, scale, row, scaled)
    elif call.query_kind == 1:
        _scale(shape, call, BFLOAT, scale, row, scaled)
    else:
        _scale(shape, call, HALF, scale, row, scaled)
    for at in range(call.queries * shape.query_bytes, call.padded * shape.query_bytes, 4):
        put_float(scaled + at, np.float32(0.0))


@part
def _scale(shape: Any, call: Call, numbers: Any, scale: float, row: int, scaled: int) -> None:
    count, line = call.queries * shape.key_dim, shape.line
    source, whole = call.query + row * count * numbers.itemsize, count - count % line.lanes
    for index in range(0, whole, line.lanes):
        part = load(line, numbers, source + index * numbers.itemsize)
        store(scaled + 4 * index, multiply(part, splat(line, scale)))
    for index in range(whole, count):
        put_float(scaled + 4 * index, number_at(numbers, source + index * numbers.itemsize) * scale)
