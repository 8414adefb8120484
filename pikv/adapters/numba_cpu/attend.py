"""Attention of the queries of each KV head to its pages and its tail: split into jobs, shared out, merged.

How pages are split depends on their number alone, so results do not depend on how many threads there are.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

import pikv.adapters.numba_cpu.dots  # noqa: F401  # how pages are scored and summed
from pikv.adapters.numba_cpu.compiled import COMPILED, inlined, part
from pikv.adapters.numba_cpu.merge import LOG_2, merge
from pikv.adapters.numba_cpu.pages import add_values, score_keys
from pikv.adapters.numba_cpu.query import scale_queries
from pikv.adapters.numba_cpu.shape import Call
from pikv.adapters.numba_cpu.simd import float_at, int_at, long_at, put_float, total
from pikv.adapters.numba_cpu.softmax import begin, hide, weigh
from pikv.adapters.numba_cpu.tail import attend_tail


@numba.njit(cache=True, **COMPILED)
def attend_alone(shape: Any, call: Call, scale: float, workers: int) -> None:
    """Do what `call` says, by one worker. scale: of the scores, in units of log 2."""
    _attend_jobs(shape, call, scale, 0, 1)
    _merge_rows(shape, call, 0, 1)


@numba.njit(parallel=True, cache=True, **COMPILED)
def attend_together(shape: Any, call: Call, scale: float, workers: int) -> None:
    """The same by several workers, each in a thread of numba's."""
    for phase in range(2):
        for worker in numba.prange(workers):
            if phase == 0:
                _attend_jobs(shape, call, scale, worker, workers)
            else:
                _merge_rows(shape, call, worker, workers)


@inlined
def share(count: int, worker: int, workers: int) -> Any:
    """The first of a worker's share, and of the next worker's: shares are runs, as equal as can be."""
    return count * worker // workers, count * (worker + 1) // workers


@part
def _attend_jobs(shape: Any, call: Call, scale: float, worker: int, workers: int) -> None:
    splits = call.page_splits + call.tail_splits
    scratch = call.scratch + worker * (call.padded * shape.query_bytes + shape.block_bytes)
    first, last = share(call.table_rows * splits, worker, workers)
    for job in range(first, last):
        row, split = job // splits, job % splits
        states = call.states + job * call.padded * shape.state_bytes
        for query in range(call.padded):
            begin(shape, states + query * shape.state_bytes)
        if job == first or split == 0:
            scale_queries(shape, call, scale, row, scratch)
        if split < call.page_splits:
            _attend_pages(shape, call, row, split, scratch, states)
        else:
            attend_tail(shape, call, row, split - call.page_splits, scratch, states)


@part
def _attend_pages(shape: Any, call: Call, row: int, split: int, queries: int, states: int) -> None:
    first, last = share(call.pages, split, call.page_splits)
    scores = queries + call.padded * shape.query_bytes
    newest = call.table_rows * call.pages - 1
    for place in range(row * call.pages + first, row * call.pages + last):
        live = long_at(call.live + 8 * place)
        if live == 0:
            _put_nothing(call, row, place)
            continue
        page = page_at(shape, call, place)
        ahead = page_at(shape, call, min(place + shape.ahead, newest))
        for query in range(0, call.padded, shape.rows):
            state = states + query * shape.state_bytes
            score_keys(shape.keys, shape, page, ahead, queries + query * shape.query_bytes, scores)
            hide(shape, call, row, query, shape.page_size, page + shape.positions, live, scores)
            _weigh_rows(shape, call, row, query, place, scores, state)
            add_values(shape.values, shape, page, ahead, shape.page_size, scores, state)


@inlined
def page_at(shape: Any, call: Call, place: int) -> int:
    """The address of the page at a place in the table."""
    return call.slab + np.int64(int_at(call.rows + 4 * place)) * shape.stride


@part
def _weigh_rows(shape: Any, call: Call, row: int, query: int, place: int, scores: int, states: int) -> None:
    """Turn a block's scores of a page into weights; write the page's log-sum-exp if it is asked for."""
    for each in range(shape.rows):
        state = states + each * shape.state_bytes
        sums = weigh(shape, scores + each * shape.score_bytes, state)
        if call.page_lse != 0 and query + each < call.queries:
            highest = float_at(state + shape.state_bytes - 4)
            put_float(_page_lse_at(call, row, query + each, place), (highest + np.log2(total(sums))) * LOG_2)


@part
def _put_nothing(call: Call, row: int, place: int) -> None:
    """Write the log-sum-exp of a page that nobody sees, if it is asked for."""
    if call.page_lse != 0:
        for query in range(call.queries):
            put_float(_page_lse_at(call, row, query, place), np.float32(-np.inf))


@inlined
def _page_lse_at(call: Call, row: int, query: int, place: int) -> int:
    return call.page_lse + 4 * ((row * call.queries + query) * call.pages + place - row * call.pages)


@part
def _merge_rows(shape: Any, call: Call, worker: int, workers: int) -> None:
    splits, between = call.page_splits + call.tail_splits, call.padded * shape.state_bytes
    first, last = share(call.table_rows * call.queries, worker, workers)
    for index in range(first, last):
        row, query = index // call.queries, index % call.queries
        states = call.states + row * splits * between + query * shape.state_bytes
        merge(shape, states, between, splits, call.output + index * shape.sum_bytes, call.lse + 4 * index)
