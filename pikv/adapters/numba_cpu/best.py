"""The best of a row of scores, found by counting their digits."""

from __future__ import annotations

from typing import Any

import numpy as np

from pikv.adapters.numba_cpu.compiled import part


@part
def best(keys: Any, row: int, count: int, columns: Any, tally: Any) -> None:
    """Write the columns of the newest and of the best pages, in order. keys: the bits of their scores, changed."""
    wanted = columns.shape[1]
    if count <= wanted:
        for column in range(wanted):
            columns[row, column] = column
        return
    for column in range(count):  # numbers that are in the order of the scores
        bits = keys[row, column]
        keys[row, column] = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys[row, count - 1] = 0x7FFFFFFF
    least, equals = _threshold(keys, row, count, wanted, tally)
    place = 0
    for column in range(count):
        key = keys[row, column]
        if key > least or (key == least and equals > 0):
            equals -= key == least
            columns[row, place] = column
            place += 1


@part
def _threshold(keys: Any, row: int, count: int, wanted: int, tally: Any) -> Any:
    """The `wanted` greatest key, and how many equal to it are wanted: digit by digit, counting."""
    known, mask, missing = np.int64(0), np.int64(0), wanted
    for shift in (24, 16, 8, 0):
        tally[:] = 0
        for column in range(count):
            key = np.int64(keys[row, column]) + 0x80000000
            if key & mask == known:
                tally[(key >> shift) & 255] += 1
        digit = 255
        while tally[digit] < missing:
            missing -= tally[digit]
            digit -= 1
        known |= digit << shift
        mask |= 255 << shift
    return known - 0x80000000, missing
