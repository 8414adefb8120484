"""The tail of a row: the newest tokens, dense and token by token, a page's worth at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from pikv.adapters.numba_cpu.compiled import part
from pikv.adapters.numba_cpu.pages import add_values
from pikv.adapters.numba_cpu.shape import Call
from pikv.adapters.numba_cpu.simd import float_at, fma, load, long_at, number_at, put_float
from pikv.adapters.numba_cpu.softmax import hide, weigh
from pikv.adapters.numba_cpu.tiles import load_tile, put_totals, zeros


@part
def attend_tail(shape: Any, call: Call, row: int, split: int, queries: int, states: int) -> None:
    """Attend a row's queries to one of `call.tail_splits` parts of its tail."""
    scores = queries + call.padded * shape.query_bytes
    length = long_at(call.tail_lengths + 8 * row)
    chunks = (length + shape.page_size - 1) // shape.page_size
    first, last = chunks * split // call.tail_splits, chunks * (split + 1) // call.tail_splits
    for start in range(first * shape.page_size, last * shape.page_size, shape.page_size):
        tokens, place = min(shape.page_size, length - start), row * call.tail_room + start
        keys = call.tail_keys + place * shape.key_dim * shape.tail.numbers.itemsize
        values = call.tail_values + place * shape.value_dim * shape.tail.numbers.itemsize
        for query in range(0, call.padded, shape.rows):
            score_tokens(shape, keys, tokens, queries + query * shape.query_bytes, scores)
            hide(shape, call, row, query, tokens, call.tail_positions + 4 * place, shape.all_live, scores)
            for each in range(shape.rows):
                weigh(shape, scores + each * shape.score_bytes, states + (query + each) * shape.state_bytes)
            add_values(shape.tail, shape, values, values, tokens, scores, states + query * shape.state_bytes)


@part
def score_tokens(shape: Any, keys: int, tokens: int, query: int, scores: int) -> None:
    """Write the scores of `shape.rows` queries with keys [tokens, key_dim], and those of no token up to page_size."""
    numbers, column = shape.tail.numbers, shape.column
    whole = shape.key_dim - shape.key_dim % column.lanes
    for token in range(tokens):
        key = keys + token * shape.key_dim * numbers.itemsize
        sums = zeros(column)
        for channel in range(0, whole, column.lanes):
            part = load_tile(column, query + 4 * channel, shape.query_bytes)
            sums = fma(part, load(column, numbers, key + channel * numbers.itemsize), sums)
        put_totals(column, scores + 4 * token, shape.score_bytes, sums)
        for channel in range(whole, shape.key_dim):
            entry = number_at(numbers, key + channel * numbers.itemsize)
            for row in range(shape.rows):
                place = scores + row * shape.score_bytes + 4 * token
                asked = float_at(query + row * shape.query_bytes + 4 * channel)
                put_float(place, float_at(place) + asked * entry)
    for row in range(shape.rows):
        for slot in range(tokens, shape.page_size):
            put_float(scores + row * shape.score_bytes + 4 * slot, np.float32(-np.inf))
