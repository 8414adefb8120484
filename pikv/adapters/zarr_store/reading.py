"""How pages of a segment are read: as long runs as there are, checked while they are in the processor's cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from pikv.adapters.zarr_store import arrays
from pikv.adapters.zarr_store.objects import Objects
from pikv.adapters.zarr_store.segments import Segment
from pikv.core.files import as_buffer

AT_ONCE = 1 << 20  # bytes that are read before they are checked
THREADS = 2  # one reads while another checks


def read_pages(objects: Objects, parts: Iterable[tuple[Segment, Tensor, Tensor]], out: Tensor) -> list[int]:
    """Read pages into out uint8 [n, page_bytes]: of each segment rows int64 [m], ascending, to out[index int64 [m]].

    Returns which rows of out are missing or damaged.
    """
    blocks = [
        _Block(objects, segment, rows[first : first + most], index[first : first + most], out)
        for segment, index, rows in parts
        for most in [max(1, AT_ONCE // segment.page_bytes)]
        for first in range(0, len(rows), most)
    ]
    if len(blocks) < 2 * THREADS:
        return [row for block in blocks for row in block.read()]
    with ThreadPoolExecutor(THREADS) as pool:
        return [row for bad in pool.map(_Block.read, blocks) for row in bad]


class _Block:
    """Rows of one segment that are read in one call."""

    def __init__(self, objects: Objects, segment: Segment, rows: Tensor, index: Tensor, out: Tensor) -> None:
        self._objects, self._segment = objects, segment
        self._rows, self._index, self._out = rows, index, out

    def read(self) -> list[int]:
        """Return which rows of out are missing or damaged."""
        length, rows, index = self._segment.page_bytes, self._rows.tolist(), self._index.tolist()
        memory = as_buffer(self._out)
        apart = torch.nonzero((self._rows.diff() != 1) | (self._index.diff() != 1)).flatten() + 1
        starts = [0, *apart.tolist(), len(rows)]
        ranges = [
            (rows[first] * length, memory[index[first] * length : (index[first] + stop - first) * length])
            for first, stop in itertools.pairwise(starts)
        ]
        try:
            self._objects.read_ranges(self._segment.chunk, ranges)
        except OSError:
            return self._read_one_by_one() if len(rows) > 1 else index
        return self._wrong(index)

    def _read_one_by_one(self) -> list[int]:
        pages = zip(self._rows.split(1), self._index.split(1), strict=True)
        return [bad for row, at in pages for bad in _Block(self._objects, self._segment, row, at, self._out).read()]

    def _wrong(self, index: list[int]) -> list[int]:
        expected = self._segment.checksums[self._rows].tolist()
        got = arrays.checksums(self._out, index)
        return [row for row, one, other in zip(index, got, expected, strict=True) if one != other]
