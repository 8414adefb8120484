"""Scores by keys and sums of values that are stored as codes, each small group of which has a scale and a zero.

An entry is `code * scale + zero`. For keys the scales of a group of tokens are folded into the query, and for values
those of a group of channels into the weights: what is left is a sum of folded numbers times codes, and what the zeros
add, which is the same for all of a group. So both sides do the same, in a page's words of codes (`Affine`, order
"words"): `fold` once a group, then `add_codes`, of which there is one for floats and one for bytes.
"""

from __future__ import annotations

from typing import Any

from pikv.adapters.numba_cpu.compiled import part
from pikv.adapters.numba_cpu.dense import fetch
from pikv.adapters.numba_cpu.pages import add_values, does, score_keys
from pikv.adapters.numba_cpu.shape import HALF, AffineField, ByteField, DotField
from pikv.adapters.numba_cpu.simd import (
    add,
    both_bits,
    fma,
    greatest,
    load,
    magnitude,
    multiply,
    shift_right,
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

# What `fold` writes to scratch: two numbers for each row, from 0 and from TOPS on, then the folded numbers.
TOPS, FOLDED = 32, 64


@does(score_keys, AffineField, DotField, ByteField)
def score_affine(keys: Any, shape: Any, page: int, ahead: int, query: int, scores: int) -> None:
    """See score_keys."""
    scratch = scores + shape.rows * shape.score_bytes
    for group in range(keys.width // keys.group):
        fold(keys, page, ahead, group, query, shape.query_bytes, scratch)
        for first in range(group * keys.group, (group + 1) * keys.group, keys.sums.width):
            sums = add_codes(keys, page, ahead, first, scratch, spread_rows(keys.sums, scratch))
            store_tile(keys.sums, scores + 4 * first, shape.score_bytes, sums)


@does(add_values, AffineField, DotField)
def add_affine(values: Any, shape: Any, page: int, ahead: int, tokens: int, weights: int, states: int) -> None:
    """See add_values; pages are read whole, and the weights of slots without a token are 0."""
    scratch = weights + shape.rows * shape.score_bytes
    for group in range(values.width // values.group):
        fold(values, page, ahead, group, weights, shape.score_bytes, scratch)
        for first in range(group * values.group, (group + 1) * values.group, values.sums.width):
            before = load_tile(values.sums, states + 4 * first, shape.state_bytes)
            sums = add_codes(values, page, ahead, first, scratch, add(before, spread_rows(values.sums, scratch)))
            store_tile(values.sums, states + 4 * first, shape.state_bytes, sums)


@part
def fold(field: Any, page: int, ahead: int, group: int, numbers: int, stride: int, scratch: int) -> None:
    """Fold a group's scales into each row's `count` numbers, which lie `stride` bytes apart by rows.

    Writes to scratch for each row what the zeros add, the greatest magnitude of the folded numbers, and these.
    """
    line, column = field.line, field.column
    scales, between = field.scales + group * field.scale_bytes, field.zeros - field.scales
    fetch(page + scales, ahead + scales, field.scale_bytes)
    fetch(page + scales + between, ahead + scales + between, field.scale_bytes)
    zero_sums, tops = zeros(column), zeros(column)
    for entry in range(0, field.count, line.lanes):
        number = load_tile(column, numbers + 4 * entry, stride)
        folded = multiply(number, load(line, HALF, page + scales + 2 * entry))
        zero_sums = fma(number, load(line, HALF, page + scales + between + 2 * entry), zero_sums)
        tops = greatest(magnitude(folded), tops)
        store_tile(column, scratch + FOLDED + 4 * entry, 4 * field.count, folded)
    put_totals(column, scratch, 4, zero_sums)
    put_highest(column, scratch + TOPS, 4, tops)
    prepare(field, scratch)


def prepare(field: Any, scratch: int) -> None:
    """Make what `fold` has written into what `add_codes` reads."""
    raise NotImplementedError("a part of compiled code, where `does` has one for each encoding")


def add_codes(field: Any, page: int, ahead: int, first: int, scratch: int, sums: Any) -> Any:
    """Add the folded numbers times codes in the columns from `first` on to a tile `field.sums`."""
    raise NotImplementedError("a part of compiled code, where `does` has one for each encoding")


@does(prepare, AffineField)
def leave_floats(field: Any, scratch: int) -> None:
    """The folded numbers are what is read."""


@does(add_codes, AffineField)
def add_floats(field: Any, page: int, ahead: int, first: int, scratch: int, sums: Any) -> Any:
    """See add_codes; each code becomes a float."""
    tile = field.sums
    for word in range(field.count // field.codes_a_word):
        offset = field.codes + 4 * (word * field.width + first)
        fetch(page + offset, ahead + offset, 4 * tile.width)
        words = load_ints(tile, page + offset)
        for code in range(field.codes_a_word):
            shift = 8 * (code % 4) + field.bits * (code // 4)
            codes = to_float(both_bits(shift_right(words, shift), splat_int(tile, field.mask)))
            number = scratch + FOLDED + 4 * (word * field.codes_a_word + code)
            sums = add_outer(tile, sums, number, 4 * field.count, codes)
    return sums
