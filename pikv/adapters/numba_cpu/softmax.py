"""The softmax as pages go by: weights relative to a highest score that rises now and then.

Scores are in units of log 2, so weights are powers of 2. A state is what one query has summed up in one job: the sums
of values, float32 [value_dim]; the sums of weights, lane by lane; and the highest score, once in each lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pikv.adapters.numba_cpu.compiled import part
from pikv.adapters.numba_cpu.shape import FLOAT, Call
from pikv.adapters.numba_cpu.simd import (
    add,
    add_ints,
    any_above,
    bits_as_float,
    fma,
    greatest,
    highest,
    int_at,
    load,
    long_at,
    multiply,
    nearest,
    put_float,
    shift_left,
    splat,
    splat_int,
    store,
    subtract,
    to_int,
    where_above,
)

LOWEST = -1e30  # the highest score before any; finite, so that differences are numbers
SLACK = 8.0  # by how much scores may exceed the highest so far before everything is scaled down
SMALLEST = -120.0  # weights below 2**SMALLEST are 0: denormal numbers take a hundred times as long to multiply


@part
def exp2(line: Any, x: Any) -> Any:
    """2**x in each lane: 2**n by its exponent's bits, times a polynomial of x - n between -1/2 and 1/2."""
    clamped = greatest(x, splat(line, SMALLEST))
    whole = nearest(clamped)
    part = subtract(clamped, whole)
    power = splat(line, 1.33937e-3)
    power = fma(power, part, splat(line, 9.61813e-3))
    power = fma(power, part, splat(line, 5.550328e-2))
    power = fma(power, part, splat(line, 2.4022651e-1))
    power = fma(power, part, splat(line, 6.9314718e-1))
    power = fma(power, part, splat(line, 1.0))
    scale = bits_as_float(shift_left(add_ints(to_int(whole), splat_int(line, 127)), 23))
    return where_above(x, splat(line, SMALLEST), multiply(power, scale), splat(line, 0.0))


@part
def begin(shape: Any, state: int) -> None:
    """Make a state of nothing."""
    line = shape.line
    for at in range(0, shape.state_bytes - 4 * line.lanes, 4 * line.lanes):
        store(state + at, splat(line, 0.0))
    store(state + shape.state_bytes - 4 * line.lanes, splat(line, LOWEST))


@part
def weigh(shape: Any, scores: int, state: int) -> Any:
    """Turn one query's scores of a page into weights, in place, and add them to the state. Returns their sums."""
    line, step = shape.line, 4 * shape.line.lanes
    top = load(line, FLOAT, scores)
    for at in range(step, shape.score_bytes, step):
        top = greatest(load(line, FLOAT, scores + at), top)
    high = load(line, FLOAT, state + shape.state_bytes - step)
    if any_above(top, add(high, splat(line, SLACK))):
        high = _rise(shape, greatest(top, high), state)
    page_sums = splat(line, 0.0)
    for at in range(0, shape.score_bytes, step):
        weights = exp2(line, subtract(load(line, FLOAT, scores + at), high))
        store(scores + at, weights)
        page_sums = add(page_sums, weights)
    sums = state + shape.sum_bytes
    store(sums, add(load(line, FLOAT, sums), page_sums))
    return page_sums


@part
def _rise(shape: Any, top: Any, state: int) -> Any:
    """Scale a state down to the highest of the lanes of `top`."""
    line, step = shape.line, 4 * shape.line.lanes
    place = state + shape.state_bytes - step
    high = splat(line, highest(top))
    factor = exp2(line, subtract(load(line, FLOAT, place), high))
    for at in range(0, shape.state_bytes - step, step):
        store(state + at, multiply(factor, load(line, FLOAT, state + at)))
    store(place, high)
    return high


@part
def hide(shape: Any, call: Call, row: int, query: int, slots: int, positions: int, live: int, scores: int) -> None:
    """Take the weight from slots that are not live, or older than a query sees: their scores become -inf.

    scores: of the block of queries from `query` on. positions: of int32 [slots], increasing.
    """
    for each in range(shape.rows):
        oldest = np.int64(-1)
        if call.oldest != 0 and query + each < call.queries:
            oldest = long_at(call.oldest + 8 * (row // call.heads * call.queries + query + each))
        if live == shape.all_live and int_at(positions) >= oldest:
            continue
        for slot in range(slots):
            if not (live >> slot) & 1 or int_at(positions + 4 * slot) < oldest:
                put_float(scores + each * shape.score_bytes + 4 * slot, np.float32(-np.inf))
