"""Which pages get how much attention, estimated by codes of their keys, and which are read: in compiled code.

Scores come as attention's do from pages of codes, see affine.py; with products of bytes the folded queries have one
digit, an error that is small beside that of codes of 4 bits and fewer. Then pages are compared by their shares of the
attention, and as few are read as reach the wanted mass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np

import pikv.adapters.numba_cpu.dots  # noqa: F401  # how keys in codes are scored
from pikv.adapters.numba_cpu.attend import share
from pikv.adapters.numba_cpu.best import best
from pikv.adapters.numba_cpu.compiled import COMPILED, part
from pikv.adapters.numba_cpu.pages import score_keys
from pikv.adapters.numba_cpu.shape import FLOAT
from pikv.adapters.numba_cpu.simd import (
    add,
    fma,
    greatest,
    highest,
    load,
    multiply,
    splat,
    store,
    subtract,
    total,
)
from pikv.adapters.numba_cpu.softmax import LOWEST, exp2

BYTES_AHEAD = 16_384  # of index, in whole pages, that memory is fetched ahead


class Rule(NamedTuple):
    """How many pages are read: at most as there are columns, and as few as reach the mass, but for min_pages."""

    mass: float
    min_pages: int


class Row(NamedTuple):
    """Arrays by row of the table, which is a KV head's.

    ids int32 [rows, width] and counts [rows]; beside float32 [rows, group]; out of which come columns int64 [rows, n],
    reads [rows] and left_out float32 [rows].
    """

    ids: Any
    counts: Any
    beside: Any
    columns: Any
    reads: Any
    left_out: Any


@numba.njit(cache=True, **COMPILED)
def choose_alone(codes: Any, index: int, query: int, table: Row, rule: Rule, heads: int, workers: int) -> None:
    """index, query: addresses of uint8 [page ids, stride] and float32 [rows, blocks * codes.rows, key_dim]."""
    masses, weights = _memory(codes, table)
    _sum_pages(codes, index, query, table, masses, heads, 0, 1)
    _choose_rows(codes, table, rule, masses, weights, 0, 1)


@numba.njit(parallel=True, cache=True, **COMPILED)
def choose_together(codes: Any, index: int, query: int, table: Row, rule: Rule, heads: int, workers: int) -> None:
    """The same by several workers, each in a thread of numba's."""
    masses, weights = _memory(codes, table)
    for phase in range(2):
        for worker in numba.prange(workers):
            if phase == 0:
                _sum_pages(codes, index, query, table, masses, heads, worker, workers)
            else:
                _choose_rows(codes, table, rule, masses, weights, worker, workers)


@part
def _memory(codes: Any, table: Row) -> Any:
    """Of each row and query head, for each page the highest score and the sum relative to it; of each row weights."""
    rows, width = table.ids.shape
    whole = -(-width // codes.machine.lanes) * codes.machine.lanes
    masses = np.empty((rows, codes.blocks * codes.rows, 2, whole), np.float32)
    return masses, np.empty((rows, whole), np.float32)


@part
def _sum_pages(
    codes: Any, index: int, query: int, table: Row, masses: Any, heads: int, worker: int, workers: int
) -> None:
    """Sum up a worker's share: page by page of all heads, which were sealed together and lie side by side."""
    rows, width = table.ids.shape
    first, last = share(rows // heads * width, worker, workers)
    columns_ahead = max(1, BYTES_AHEAD // (codes.stride * heads))
    scratch = np.empty(codes.block_bytes + 63, np.uint8)
    scores = (scratch.ctypes.data + 63) // 64 * 64
    for place in range(first, last):
        column = place % width
        ahead_column = min(column + columns_ahead, width - 1)
        for row in range(place // width * heads, (place // width + 1) * heads):
            if column < table.counts[row]:
                page = index + np.int64(table.ids[row, column]) * codes.stride
                ahead = index + np.int64(table.ids[row, ahead_column]) * codes.stride
                asked = query + row * codes.blocks * codes.rows * codes.query_bytes
                _sum_page(codes, page, ahead, asked, scores, masses[row, :, :, column:])


@part
def _sum_page(codes: Any, page: int, ahead: int, query: int, scores: int, masses: Any) -> None:
    """Write what a page gets from each query head to masses [heads, 2, 0]: see _memory."""
    line, step = codes.line, 4 * codes.line.lanes
    for block in range(codes.blocks):
        score_keys(codes.keys, codes, page, ahead, query + block * codes.rows * codes.query_bytes, scores)
        for head in range(codes.rows):
            start = scores + head * codes.score_bytes
            top = load(line, FLOAT, start)
            for at in range(step, codes.score_bytes, step):
                top = greatest(load(line, FLOAT, start + at), top)
            high = highest(top)
            sums = splat(line, 0.0)
            for at in range(0, codes.score_bytes, step):
                sums = add(sums, exp2(line, subtract(load(line, FLOAT, start + at), splat(line, high))))
            masses[block * codes.rows + head, 0, 0] = high
            masses[block * codes.rows + head, 1, 0] = total(sums)


@part
def _choose_rows(codes: Any, table: Row, rule: Rule, masses: Any, weights: Any, worker: int, workers: int) -> None:
    """Choose for a worker's share of the rows."""
    tally = np.empty(256, np.int64)
    first, last = share(len(table.counts), worker, workers)
    for row in range(first, last):
        count = table.counts[row]
        weights[row] = 0.0
        for head in range(codes.group):
            _add_shares(codes, masses[row, head], count, table.beside[row, head], weights[row])
        _choose(table, rule, weights, row, count, tally)


@part
def _add_shares(codes: Any, masses: Any, count: int, beside: float, weights: Any) -> None:
    """Add the shares of attention that a query head gives to each page to their mean over the group."""
    line, lanes = codes.line, codes.line.lanes
    highs, sums = masses[0].ctypes.data, masses[1].ctypes.data
    masses[0, count:], masses[1, count:] = LOWEST, 0.0
    beside *= np.float32(1.0 / math.log(2.0))
    top = splat(line, max(beside, np.float32(LOWEST)))
    for at in range(0, 4 * masses.shape[1], 4 * lanes):
        top = greatest(load(line, FLOAT, highs + at), top)
    high = splat(line, highest(top))
    everything = splat(line, 0.0)
    for at in range(0, 4 * masses.shape[1], 4 * lanes):
        mass = multiply(load(line, FLOAT, sums + at), exp2(line, subtract(load(line, FLOAT, highs + at), high)))
        store(sums + at, mass)
        everything = add(everything, mass)
    whole = total(everything) + np.exp2(max(beside, np.float32(LOWEST)) - highest(top))
    factor = splat(line, np.float32(1.0) / (whole * np.float32(codes.group)))
    for at in range(0, 4 * masses.shape[1], 4 * lanes):
        place = weights.ctypes.data + at
        store(place, fma(load(line, FLOAT, sums + at), factor, load(line, FLOAT, place)))


@part
def _choose(table: Row, rule: Rule, weights: Any, row: int, count: int, tally: Any) -> None:
    """Choose a row's newest page and its heaviest ones, as few as reach the mass. weights: of all rows' pages."""
    keys, columns = weights.view(np.int32), table.columns
    most, newest = min(count, columns.shape[1]), max(0, count - 1)
    left = np.float64(0.0)
    for column in range(newest):
        left += weights[row, column]
    best(keys, row, count, columns, tally)
    others = np.empty(max(0, most - 1), np.float32)  # the newest is the last of the columns
    for place in range(len(others)):
        others[place] = weights[row, columns[row, place]]
    others.sort()
    reads = min(1, most)
    while reads < most and (left > 1.0 - rule.mass or reads < rule.min_pages):
        left -= others[len(others) - reads]
        reads += 1
    if reads < most:
        best(keys, row, count, columns[:, :reads], tally)
    table.reads[row] = reads
    table.left_out[row] = max(left, 0.0)
