"""Attention of the queries of each KV head to its pages and its tail: split into jobs, shared out, merged.

How pages are split depends on their number alone, so results do not depend on how many threads there are.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

import pikv.adapters.numba_cpu.dots  # noqa: F401  # how pages are scored and summed
from pikv.adapters.numba_cpu.compiled import INLINED, compiled
from pikv.adapters.numba_cpu.merge import LOG_2, merge
from pikv.adapters.numba_cpu.pages import add_values, score_keys
from pikv.adapters.numba_cpu.shape import Call
from pikv.adapters.numba_cpu.simd import float_at, int_at, long_at, put_float, total
from pikv.adapters.numba_cpu.softmax import begin, weigh


@numba.njit(parallel=True, cache=True, **INLINED)
def attend(shape: Any, call: Call, scale: float) -> None:
    """Do what `call` says. scale: of the scores, in units of log 2."""
    workers = call.workers
    if workers == 1:  # wakes nobody, and waits for nobody
        _attend_jobs(shape, call, scale, 0)
        _merge_rows(shape, call, 0)
        return
    for phase in range(2):
        for worker in numba.prange(workers):
            if phase == 0:
                _attend_jobs(shape, call, scale, worker)
            else:
                _merge_rows(shape, call, worker)


@compiled
def share(count: int, worker: int, workers: int) -> Any:
    """The first of a worker's share, and of the next worker's: shares are runs, as equal as can be."""
    return count * worker // workers, count * (worker + 1) // workers


@compiled
def _attend_jobs(shape: Any, call: Call, scale: float, worker: int) -> None:
    splits = call.page_splits + call.tail_splits
    scratch = call.scratch + worker * (call.padded * shape.query_bytes + shape.block_bytes)
    first, last = share(call.rows_of_table * splits, worker, call.workers)
    for job in range(first, last):
        row, split = job // splits, job % splits
        state = call.states + job * call.padded * shape.state_bytes
        for query in range(call.padded):
            begin(shape, state + query * shape.state_bytes)
        _scale_queries(shape, call, scale, row, scratch)
        if split < call.page_splits:
            _attend_pages(shape, call, row, split, scratch, state)
        else:
            pass


@compiled
def _scale_queries(shape: Any, call: Call, scale: float, row: int, scaled: int) -> None:
    """Write a row's queries times the scale, and zeros up to `padded`."""
    count = call.queries * shape.key_dim
    source = call.query + 4 * row * count
    for at in range(0, 4 * count, 4):
        put_float(scaled + at, float_at(source + at) * scale)
    for at in range(4 * count, call.padded * shape.query_bytes, 4):
        put_float(scaled + at, np.float32(0.0))


@compiled
def _attend_pages(shape: Any, call: Call, row: int, split: int, queries: int, states: int) -> None:
    first, last = share(call.pages, split, call.page_splits)
    scores = queries + call.padded * shape.query_bytes
    newest = call.rows_of_table * call.pages - 1
    for place in range(row * call.pages + first, row * call.pages + last):
        live = long_at(call.live + 8 * place)
        if live == 0:
            put_nothing(shape, call, place, row)
            continue
        page = page_at(shape, call, place)
        ahead = page_at(shape, call, min(place + shape.ahead, newest))
        for query in range(0, call.padded, shape.rows):
            state = states + query * shape.state_bytes
            score_keys(shape.keys, shape, page, ahead, queries + query * shape.query_bytes, scores)
            hide(shape, call, row, query, page + shape.positions, live, scores)
            weigh_rows(shape, call, query, place, scores, state)
            add_values(shape.values, shape, page, ahead, shape.page_size, scores, state)


@compiled
def page_at(shape: Any, call: Call, place: int) -> int:
    """The address of the page at a place in the table."""
    return call.slab + np.int64(int_at(call.rows + 4 * place)) * shape.stride


@compiled
def hide(shape: Any, call: Call, row: int, query: int, positions: int, live: int, scores: int) -> None:
    """Make the scores of slots that are not live, or older than a query sees, those of tokens without weight."""
    if live == shape.all_live and call.oldest == 0:
        return
    for each in range(shape.rows):
        oldest = np.int64(0)
        if call.oldest != 0 and query + each < call.queries:
            oldest = long_at(call.oldest + 8 * (row // call.heads * call.queries + query + each))
        for slot in range(shape.page_size):
            if not (live >> slot) & 1 or int_at(positions + 4 * slot) < oldest:
                put_float(scores + each * shape.score_bytes + 4 * slot, np.float32(-np.inf))


@compiled
def weigh_rows(shape: Any, call: Call, query: int, place: int, scores: int, states: int) -> None:
    """Turn `rows` queries' scores of a page into weights; write the page's log-sum-exp if it is asked for."""
    for each in range(shape.rows):
        state = states + each * shape.state_bytes
        sums = weigh(shape, scores + each * shape.score_bytes, state)
        if call.page_logs != 0 and query + each < call.queries:
            high = float_at(state + shape.state_bytes - 4)
            place_of_log = (place // call.pages * call.queries + query + each) * call.pages + place % call.pages
            put_float(call.page_logs + 4 * place_of_log, (high + np.log2(total(sums))) * np.float32(LOG_2))


@compiled
def put_nothing(shape: Any, call: Call, place: int, row: int) -> None:
    """Write the log-sum-exp of a page that nobody sees, if it is asked for."""
    if call.page_logs != 0:
        for query in range(call.queries):
            place_of_log = (row * call.queries + query) * call.pages + place % call.pages
            put_float(call.page_logs + 4 * place_of_log, np.float32(-np.inf))


@compiled
def _merge_rows(shape: Any, call: Call, worker: int) -> None:
    splits, between = call.page_splits + call.tail_splits, call.padded * shape.state_bytes
    first, last = share(call.rows_of_table * call.queries, worker, call.workers)
    for index in range(first, last):
        row, query = index // call.queries, index % call.queries
        states = call.states + row * splits * between + query * shape.state_bytes
        merge(shape, states, between, splits, call.output + index * shape.sum_bytes, call.logs + 4 * index)
