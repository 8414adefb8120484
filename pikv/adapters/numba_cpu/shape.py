"""The shape of a layer's pages as kernels are compiled for it, and where a call finds what."""

from __future__ import annotations

from typing import NamedTuple

import attrs

from pikv.adapters.numba_cpu.machine import Machine
from pikv.adapters.numba_cpu.simd import Numbers, Tile
from pikv.adapters.numba_cpu.static import static
from pikv.core.tables import all_live

FLOAT = Numbers("f32", 4)


@static
@attrs.frozen(kw_only=True)
class DenseField:
    """Keys or values stored as they are, `offset` bytes into a page."""

    numbers: Numbers
    offset: int


@static
@attrs.frozen(kw_only=True)
class Shape:
    """What a kernel is compiled for.

    rows: how many queries of a KV head are served together, each reading a key once for all. stride: the bytes of a
    page. positions: where its positions lie. tail: how the tail's numbers are stored. ahead: how many pages ahead
    memory is fetched. sources: of the kernels' source files, so that none compiled from others is taken from disk.
    """

    machine: Machine
    page_size: int
    key_dim: int
    value_dim: int
    rows: int
    stride: int
    positions: int
    ahead: int
    keys: DenseField
    values: DenseField
    sources: int

    @property
    def score_tile(self) -> Tile:
        """Scores of `rows` queries and some of a page's tokens."""
        return self._tile(self.page_size)

    @property
    def sum_tile(self) -> Tile:
        """Sums of `rows` queries over some of the value channels."""
        return self._tile(self.value_dim)

    @property
    def all_live(self) -> int:
        """The live mask of a page without a dead slot."""
        return all_live(self.page_size)

    @property
    def line(self) -> Tile:
        """One vector."""
        return Tile(self.machine.lanes, 1, 1)

    def _tile(self, width: int) -> Tile:
        """The widest that divides `width` and whose sums stay in registers."""
        lanes, vectors = self.machine.lanes, width // self.machine.lanes
        most = max(1, self.machine.sums // self.rows)
        return Tile(lanes, self.rows, max(n for n in range(1, most + 1) if vectors % n == 0))

    # Bytes of what one query needs in scratch memory.

    @property
    def query_bytes(self) -> int:
        """A scaled query."""
        return 4 * self.key_dim

    @property
    def score_bytes(self) -> int:
        """Scores of a page's tokens."""
        return 4 * self.page_size

    @property
    def sum_bytes(self) -> int:
        """The sums of values."""
        return 4 * self.value_dim

    @property
    def state_bytes(self) -> int:
        """What one job and query keep: sums, then lane by lane the sums of weights, and the highest score."""
        return self.sum_bytes + 8 * self.machine.lanes


class Call(NamedTuple):
    """One call of a kernel: addresses, and counts. All int64.

    slab uint8 [rows, stride], rows int32 and live int64 [sequences * kv_heads, pages] in pages of `Shape`.
    query [sequences * kv_heads, queries, key_dim] float32; oldest int64 [sequences, queries], 0 for no bound.
    tail_keys, tail_values [sequences * kv_heads, tail_room, dim], tail_positions int32 [.., tail_room], tail_lengths
    int64 [sequences * kv_heads].
    output float32 [sequences * kv_heads, queries, value_dim], logs [sequences * kv_heads, queries], page_logs [..,
    pages] or 0. states: scratch for each job. scratch: for each worker.
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
    logs: int
    page_logs: int
    states: int
    scratch: int
    heads: int
    rows_of_table: int
    pages: int
    queries: int
    padded: int
    tail_room: int
    page_splits: int
    tail_splits: int
    workers: int
