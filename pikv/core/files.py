"""Tensors to and from open files, whole or not at all; nothing is copied on the way."""

from __future__ import annotations

import ctypes
import os

from torch import Tensor


def as_buffer(states: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU. Keep the tensor for as long as the view is used."""
    if not states.numel():
        return memoryview(b"")
    return memoryview((ctypes.c_char * states.nbytes).from_address(states.data_ptr())).cast("B")


def write_at(file: int, states: memoryview, offset: int) -> None:
    """Write all bytes at an offset. Raises OSError."""
    written = 0
    while written < len(states):
        written += os.pwrite(file, states[written:], offset + written)


def read_at(file: int, out: memoryview, offset: int) -> None:
    """Fill `out` from an offset on. Raises OSError, also if the file ends before."""
    done = 0
    while done < len(out):
        got = os.preadv(file, [out[done:]], offset + done)
        if not got:
            raise OSError(f"the file ends {len(out) - done} bytes before what is to be read at {offset} does")
        done += got
