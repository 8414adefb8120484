"""Scores by keys and sums of values that are stored as codes, each small group of which has a scale and a zero.

An entry is `code * scale + zero`. For keys the scales of a group of tokens are folded into the query, and for values
those of a group of channels into the weights: what is left is a sum of folded numbers times codes, and what the zeros
add, which is the same for all of a group. So both sides do the same, by `group_sums`, in a page's words of codes
(`Affine`, order "words").

Where the processor multiplies bytes (`Machine.dots`), the folded numbers are whole multiples of a 16000th of the
greatest of them, in two digits to base 128. One digit alone would be too coarse where channels differ in size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pikv.adapters.numba_cpu.compiled import compiled
from pikv.adapters.numba_cpu.dense import fetch
from pikv.adapters.numba_cpu.dots import DIGITS, HIGHEST, add_dots, digits_as_float, no_dots, put_digits
from pikv.adapters.numba_cpu.pages import add_values, does, score_keys
from pikv.adapters.numba_cpu.shape import HALF, AffineField
from pikv.adapters.numba_cpu.simd import (
    add,
    both_bits,
    float_at,
    fma,
    greatest,
    load,
    magnitude,
    multiply,
    put_float,
    shift_right,
    splat,
    splat_int,
    to_float,
)
from pikv.adapters.numba_cpu.tiles import (
    add_outer,
    load_ints,
    load_tile,
    put_highest,
    put_totals,
    spread_rows,
    store_tile,
    zeros,
)

HEADER = 64  # bytes of what `fold` writes before the folded numbers: room for two numbers of MOST_ROWS rows
SMALLEST = 1e-30  # of the greatest folded number, so that none is divided by 0


@does(score_keys, AffineField)
def score_affine(keys: Any, shape: Any, page: int, ahead: int, query: int, scores: int) -> None:
    """See score_keys."""
    tile, scratch = keys.sums, scores + shape.rows * shape.score_bytes
    fetch(page + keys.scales, ahead + keys.scales, 2 * keys.zeros - 2 * keys.scales)
    for group in range(shape.page_size // keys.group):
        fold(keys, shape.key_dim, shape.page_size, page, group, query, shape.query_bytes, scratch)
        for first in range(group * keys.group, (group + 1) * keys.group, tile.width):
            sums = group_sums(keys, shape.key_dim, shape.page_size, page, ahead, first, scratch)
            store_tile(tile, scores + 4 * first, shape.score_bytes, sums)


@does(add_values, AffineField)
def add_affine(values: Any, shape: Any, page: int, ahead: int, tokens: int, weights: int, states: int) -> None:
    """See add_values; pages are read whole, and weights of slots without a token are 0."""
    tile, scratch = values.sums, weights + shape.rows * shape.score_bytes
    fetch(page + values.scales, ahead + values.scales, 2 * values.zeros - 2 * values.scales)
    for group in range(shape.value_dim // values.group):
        fold(values, shape.page_size, shape.value_dim, page, group, weights, shape.score_bytes, scratch)
        for first in range(group * values.group, (group + 1) * values.group, tile.width):
            place = states + 4 * first
            sums = group_sums(values, shape.page_size, shape.value_dim, page, ahead, first, scratch)
            store_tile(tile, place, shape.state_bytes, add(load_tile(tile, place, shape.state_bytes), sums))


@compiled
def fold(field: Any, count: int, width: int, page: int, group: int, numbers: int, stride: int, scratch: int) -> None:
    """Fold a group's scales and zeros into each row's `count` numbers, which lie `stride` bytes apart by rows.

    Writes to scratch, in this order, for each of the rows: what the zeros add, the size of a unit of the last digit,
    the folded numbers, and their digits.
    """
    line, column, rows = field.line, field.column, field.column.rows
    folded = scratch + HEADER
    zero_sums, tops = zeros(column), zeros(column)
    scales = page + field.scales + 2 * group * count
    for at in range(0, count, line.lanes):
        number = load_tile(column, numbers + 4 * at, stride)
        product = multiply(number, load(line, HALF, scales + 2 * at))
        zero_sums = fma(number, load(line, HALF, scales + field.zeros - field.scales + 2 * at), zero_sums)
        tops = greatest(magnitude(product), tops)
        store_tile(column, folded + 4 * at, 4 * count, product)
    put_totals(column, scratch, zero_sums)
    if field.dots:
        put_highest(column, scratch + 4 * rows, tops)
        for row in range(rows):
            unit = max(float_at(scratch + 4 * (rows + row)), np.float32(SMALLEST)) / np.float32(HIGHEST)
            put_float(scratch + 4 * (rows + row), unit)
            source, digits = folded + 4 * row * count, folded + 4 * rows * count + row * count
            inverse = splat(line, np.float32(1.0) / unit)
            for at in range(0, count, DIGITS):
                put_digits(line, source + 4 * at, inverse, digits + at, digits + rows * count + at)


@compiled
def group_sums(field: Any, count: int, width: int, page: int, ahead: int, first: int, scratch: int) -> Any:
    """The sums over `count` entries of each of the columns first ... of a group, for each row: a tile `field.sums`.

    width: the columns of a page.
    """
    tile, rows = field.sums, field.column.rows
    folded = scratch + HEADER
    if field.dots:
        digits = folded + 4 * rows * count
        dots = no_dots(tile)
        for word in range(count // field.codes_a_word):
            offset = field.codes + 4 * (word * width + first)
            fetch(page + offset, ahead + offset, 4 * tile.width)
            words = load_ints(tile, page + offset)
            for part in range(field.codes_a_word // 4):
                codes = both_bits(shift_right(words, part * field.bits), splat_int(tile, field.byte_mask))
                dots = add_dots(tile, dots, digits + 4 * (word * (field.codes_a_word // 4) + part), count, codes)
        sums = multiply(digits_as_float(tile, dots), spread_rows(tile, scratch + 4 * rows))
    else:
        sums = zeros(tile)
        for word in range(count // field.codes_a_word):
            offset = field.codes + 4 * (word * width + first)
            fetch(page + offset, ahead + offset, 4 * tile.width)
            words = load_ints(tile, page + offset)
            for code in range(field.codes_a_word):
                shift = 8 * (code % 4) + field.bits * (code // 4)
                codes = to_float(both_bits(shift_right(words, shift), splat_int(tile, field.mask)))
                sums = add_outer(tile, sums, folded + 4 * (word * field.codes_a_word + code), 4 * count, codes)
    return add(sums, spread_rows(tile, scratch))
