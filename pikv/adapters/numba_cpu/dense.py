"""Scores by keys and sums of values that are stored as they are."""

from __future__ import annotations

from typing import Any

from pikv.adapters.numba_cpu.compiled import inlined
from pikv.adapters.numba_cpu.pages import add_values, does, score_keys
from pikv.adapters.numba_cpu.shape import DenseField
from pikv.adapters.numba_cpu.simd import prefetch_far, prefetch_near
from pikv.adapters.numba_cpu.tiles import add_outer, load_row, load_tile, store_tile, zeros

NEAR = 2048  # bytes ahead that memory is fetched into the first cache


@inlined
def fetch(at: int, ahead: int, nbytes: int) -> None:
    """Fetch what is read soon: the bytes NEAR on from `at` into the first cache, those at `ahead` into the second."""
    for line in range(0, nbytes, 64):
        prefetch_far(ahead + line)
        prefetch_near(at + NEAR + line)


@does(score_keys, DenseField)
def score_dense(keys: Any, shape: Any, page: int, ahead: int, query: int, scores: int) -> None:
    """See score_keys."""
    itemsize, tile = keys.numbers.itemsize, shape.score_tile
    for first in range(0, shape.page_size, tile.width):
        sums = zeros(tile)
        for channel in range(shape.key_dim):
            offset = keys.offset + (channel * shape.page_size + first) * itemsize
            fetch(page + offset, ahead + offset, tile.width * itemsize)
            tokens = load_row(tile, keys.numbers, page + offset)
            sums = add_outer(tile, sums, query + 4 * channel, shape.query_bytes, tokens)
        store_tile(tile, scores + 4 * first, shape.score_bytes, sums)


@does(add_values, DenseField)
def add_dense(values: Any, shape: Any, page: int, ahead: int, tokens: int, weights: int, states: int) -> None:
    """See add_values."""
    itemsize, tile = values.numbers.itemsize, shape.sum_tile
    for first in range(0, shape.value_dim, tile.width):
        sums = load_tile(tile, states + 4 * first, shape.state_bytes)
        for token in range(tokens):
            offset = values.offset + (token * shape.value_dim + first) * itemsize
            fetch(page + offset, ahead + offset, tile.width * itemsize)
            channels = load_row(tile, values.numbers, page + offset)
            sums = add_outer(tile, sums, weights + 4 * token, shape.score_bytes, channels)
        store_tile(tile, states + 4 * first, shape.state_bytes, sums)
