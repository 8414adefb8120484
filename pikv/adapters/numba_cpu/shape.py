"""The shape of a layer's pages as kernels are compiled for it, and where a call finds what."""

from __future__ import annotations

from typing import NamedTuple

import attrs
import torch

from pikv.adapters.numba_cpu.machine import Machine
from pikv.adapters.numba_cpu.simd import Numbers
from pikv.adapters.numba_cpu.static import static
from pikv.adapters.numba_cpu.tiles import Tile
from pikv.core.forms import ALIGNMENT
from pikv.core.tables import all_live

FLOAT, BFLOAT, HALF = Numbers("f32", 4), Numbers("bf16", 2), Numbers("f16", 2)
NUMBERS = {torch.float32: FLOAT, torch.bfloat16: BFLOAT, torch.float16: HALF}


@static
@attrs.frozen(kw_only=True)
class DenseField:
    """Keys or values stored as they are, `offset` bytes into a page."""

    numbers: Numbers
    offset: int


@attrs.frozen(kw_only=True)
class Rows:
    """What serves `rows` queries at once, on vectors of this machine."""

    machine: Machine
    rows: int

    @property
    def line(self) -> Tile:
        """One vector."""
        return Tile(self.machine.lanes, 1, 1)

    @property
    def column(self) -> Tile:
        """One vector for each of `rows` queries."""
        return Tile(self.machine.lanes, self.rows, 1)


@static
@attrs.frozen(kw_only=True)
class AffineField(Rows):
    """Keys or values stored as codes in the order "words", for products with float32 numbers.

    codes [count // codes_a_word, width, 4], scales, zeros: where they lie in a page. Sums go over `count` entries,
    channels of keys and tokens of values, in each of `width` columns. rows: of queries.
    """

    bits: int
    group: int
    codes: int
    scales: int
    zeros: int
    count: int
    width: int

    @property
    def codes_a_word(self) -> int:
        """How many codes a word of 4 bytes holds."""
        return 32 // self.bits

    @property
    def mask(self) -> int:
        """The bits of one code."""
        return (1 << self.bits) - 1

    @property
    def scale_bytes(self) -> int:
        """The scales of a group."""
        return 2 * self.count

    @property
    def sums(self) -> Tile:
        """Sums of `rows` queries over some columns of a group."""
        return _tile(self.machine, self.rows, self.group, self.machine.sums)


@static
@attrs.frozen(kw_only=True)
class DotField(AffineField):
    """The same for products of bytes, four at once."""

    @property
    def parts(self) -> int:
        """How many times four codes a word holds."""
        return self.codes_a_word // 4

    @property
    def byte_mask(self) -> int:
        """The bits of one code in each byte of a word, as an int32."""
        return int.from_bytes(4 * bytes([self.mask]), "little", signed=True)

    @property
    def digits(self) -> Tile:
        """Numbers whose digits are written at once."""
        vectors = self.count // self.machine.lanes
        return Tile(self.machine.lanes, 1, next(n for n in (4, 2, 1) if vectors % n == 0))

    @property
    def sums(self) -> Tile:
        """See AffineField; each sum is kept in two digits."""
        return _tile(self.machine, self.rows, self.group, self.machine.sums // 2)

    @property
    def dots(self) -> Tile:
        """The sums of the digits, the higher ones' first."""
        return Tile(self.machine.lanes, 2 * self.rows, self.sums.columns)


@static
@attrs.frozen(kw_only=True)
class ByteField(DotField):
    """The same with numbers of one digit only, for estimates."""

    @property
    def sums(self) -> Tile:
        """See AffineField."""
        return _tile(self.machine, self.rows, self.group, self.machine.sums)

    @property
    def dots(self) -> Tile:
        """See DotField."""
        return self.sums


Field = DenseField | AffineField | DotField | ByteField


@attrs.frozen(kw_only=True)
class Scoring(Rows):
    """Pages whose keys are scored: the bytes of what one query needs in scratch memory."""

    page_size: int
    key_dim: int

    @property
    def query_bytes(self) -> int:
        """A scaled query."""
        return 4 * self.key_dim

    @property
    def score_bytes(self) -> int:
        """Scores of a page's tokens."""
        return 4 * self.page_size

    @property
    def block_bytes(self) -> int:
        """For `rows` queries: scores, and for codes what `fold` writes."""
        return _aligned(self.rows * (self.score_bytes + 6 * max(self.key_dim, self.page_size))) + ALIGNMENT


@static
@attrs.frozen(kw_only=True)
class Shape(Scoring):
    """What a kernel is compiled for.

    rows: how many queries of a KV head are served together, each reading a key once for all. stride: the bytes of a
    page. positions: where its positions lie. tail: how the tail's numbers are stored. ahead: how many pages ahead
    memory is fetched. sources: of the kernels' source files, so that none compiled from others is taken from disk.
    """

    value_dim: int
    stride: int
    positions: int
    ahead: int
    keys: Field
    values: Field
    tail: DenseField
    sources: int

    @property
    def score_tile(self) -> Tile:
        """Scores of `rows` queries and some of a page's tokens."""
        return _tile(self.machine, self.rows, self.page_size, self.machine.sums)

    @property
    def sum_tile(self) -> Tile:
        """Sums of `rows` queries over some of the value channels."""
        return _tile(self.machine, self.rows, self.value_dim, self.machine.sums)

    @property
    def all_live(self) -> int:
        """The live mask of a page without a dead slot."""
        return all_live(self.page_size)

    @property
    def tail_bytes(self) -> int:
        """A token of the tail."""
        return (self.key_dim + self.value_dim) * self.tail.numbers.itemsize

    @property
    def sum_bytes(self) -> int:
        """The sums of values."""
        return 4 * self.value_dim

    @property
    def state_bytes(self) -> int:
        """What one job and query keep: sums, then lane by lane the sums of weights, and the highest score."""
        return self.sum_bytes + 8 * self.machine.lanes


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _tile(machine: Machine, rows: int, width: int, sums: int) -> Tile:
    """The widest tile that divides `width` and has no more than `sums` vectors, if one of as many rows can."""
    vectors, most = width // machine.lanes, max(1, sums // rows)
    return Tile(machine.lanes, rows, max(n for n in range(1, most + 1) if vectors % n == 0))


class Call(NamedTuple):
    """One call of a kernel: addresses, which are 0 for what is not given, and counts. A table row is a KV head's.

    slab: the pages; rows int32 and live int64 [table rows, pages] say which. query [table rows, queries, key_dim] of
    numbers in `query_kind`, an index of QUERIES; oldest int64 [sequences, queries]. The tail: keys and values
    [table rows, tail_room, dim], positions int32 and lengths int64 of the table rows.
    output float32 [table rows, queries, value_dim], lse [table rows, queries], page_lse [table rows, queries, pages].
    states: memory for what each job sums up; scratch: for what each worker needs. padded: queries and as many zeros as
    fill whole blocks of `Shape.rows`. Each table row is split into page_splits + tail_splits jobs.
    """

    slab: int
    rows: int
    live: int
    query: int
    oldest: int
    tail_keys: int
    tail_values: int
    tail_positions: int
    tail_lengths: int
    output: int
    lse: int
    page_lse: int
    states: int
    scratch: int
    query_kind: int
    table_rows: int
    heads: int
    pages: int
    queries: int
    padded: int
    tail_room: int
    page_splits: int
    tail_splits: int
