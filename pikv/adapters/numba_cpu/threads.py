"""How many threads kernels use: as many as torch may, and as numba may."""

from __future__ import annotations

import contextlib
import functools
import threading

import numba
import torch

_one_at_a_time = threading.Lock()


@functools.cache
def start() -> None:
    """Start numba's threads. Where it shares OpenMP with torch this sets torch's number too, so that is put back."""
    before = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(before)


def workers() -> int:
    """How many threads a kernel may use now."""
    return min(torch.get_num_threads(), numba.get_num_threads())


@functools.cache
def exclusive() -> contextlib.AbstractContextManager[object]:
    """What a kernel holds while its threads run: a lock, if those of several Python threads must not do so at once."""
    return _one_at_a_time if numba.threading_layer() == "workqueue" else contextlib.nullcontext()
