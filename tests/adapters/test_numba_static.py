"""What a kernel is compiled for is written into numba's cache on disk, which outlives the sources."""

from __future__ import annotations

import pickle

from pikv.adapters.numba_cpu.shape import FLOAT, DenseField
from pikv.adapters.numba_cpu.static import Static

WRITTEN = Static(DenseField(numbers=FLOAT, offset=64))


def test_read_back():
    """The same sources read the type that they have written."""
    assert pickle.loads(pickle.dumps(WRITTEN)) == WRITTEN


def test_written_by_other_sources():
    """A type whose class has other fields by now is read as one that nobody asks for, and can be written again.

    numba reads all that a cache holds and writes it back together with what is new.
    """
    old = pickle.dumps(WRITTEN).replace(b"offset", b"offsat")
    stale = pickle.loads(old)
    assert stale != WRITTEN
    assert not isinstance(stale, Static)
    assert pickle.loads(pickle.dumps(stale)) == stale
