"""How pages of a segment are read: as long runs as there are, each checked while it is in the processor's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv.adapters.zarr_store import arrays
from pikv.adapters.zarr_store.objects import Objects
from pikv.adapters.zarr_store.segments import Segment
from pikv.core.files import as_buffer

AT_ONCE = 1 << 20  # bytes of a run that are read before they are checked


def read_pages(objects: Objects, segment: Segment, rows: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Read the segment's rows int64 [m], ascending, into out[index] int64 [m].

    Returns which of them are missing or damaged: int64 [k], numbers below m.
    """
    page_bytes = segment.page_bytes
    most = max(1, AT_ONCE // page_bytes)
    apart = torch.nonzero((rows.diff() != 1) | (index.diff() != 1)).flatten() + 1
    bad: list[Tensor] = []
    for run in torch.tensor_split(torch.arange(len(rows)), apart.tolist()):
        for some in run.split(most):
            first, start = int(index[some[0]]), int(rows[some[0]])
            target = out[first : first + len(some)]
            bad.append(some[_wrong(objects, segment, start, target)])
    return torch.cat(bad)


def _wrong(objects: Objects, segment: Segment, start: int, out: Tensor) -> Tensor:
    """Read len(out) pages from row `start` on; returns which are missing or damaged: bool [n]."""
    expected = segment.checksums[start : start + len(out)]
    try:
        objects.read_ranges(segment.chunk, [(start * segment.page_bytes, as_buffer(out))])
    except OSError:
        if len(out) == 1:
            return torch.ones(1, dtype=torch.bool)
        return torch.cat([_wrong(objects, segment, start + i, out[i : i + 1]) for i in range(len(out))])
    return torch.tensor(arrays.checksums(out), dtype=torch.int64) != expected
