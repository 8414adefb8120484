"""The parts that jobs have summed up, made one by their log-sum-exp."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pikv.adapters.numba_cpu.compiled import part
from pikv.adapters.numba_cpu.shape import FLOAT
from pikv.adapters.numba_cpu.simd import float_at, fma, load, multiply, put_float, splat, store, total
from pikv.adapters.numba_cpu.softmax import LOWEST

LOG_2 = np.float32(math.log(2.0))


@part
def merge(shape: Any, states: int, between: int, splits: int, output: int, lse: int) -> None:
    """Write one query's output, float32 [value_dim], and its natural log-sum-exp.

    states: address of its first split's state, and `between` bytes on that of the next.
    """
    line, step = shape.line, 4 * shape.line.lanes
    high = np.float32(LOWEST)
    for split in range(splits):
        high = max(high, float_at(states + split * between + shape.sum_bytes + step))
    for at in range(0, shape.sum_bytes, step):
        store(output + at, splat(line, 0.0))
    weight_sum = np.float32(0.0)
    for split in range(splits):
        state = states + split * between
        factor = np.exp2(float_at(state + shape.sum_bytes + step) - high)
        weight_sum += factor * total(load(line, FLOAT, state + shape.sum_bytes))
        for at in range(0, shape.sum_bytes, step):
            grown = fma(load(line, FLOAT, state + at), splat(line, factor), load(line, FLOAT, output + at))
            store(output + at, grown)
    if weight_sum == 0:  # nothing is seen: the output is 0
        put_float(lse, np.float32(-np.inf))
        return
    for at in range(0, shape.sum_bytes, step):
        store(output + at, multiply(load(line, FLOAT, output + at), splat(line, np.float32(1.0) / weight_sum)))
    put_float(lse, (high + np.log2(weight_sum)) * LOG_2)
