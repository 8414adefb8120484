"""Kernels as Python calls them: compiled at the first call, run by as many threads as torch and numba both allow."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from typing import Any, final

import attrs
import numba
import torch

_one_at_a_time = threading.Lock()
_NOTHING = contextlib.nullcontext()
_log = logging.getLogger(__name__)


@final
@attrs.define(kw_only=True)
class Launch:
    """A kernel that asks for the types of its arguments at its first call; later calls must bring the same.

    Arrays must have the same type, number of dimensions and order each time. Asking for types at every call would take
    longer than a small kernel runs. alone, together: the kernel for one worker, and for several in numba's threads;
    both take the number of workers last.
    """

    alone: Any
    together: Any
    _compiled: dict[bool, Any] = attrs.field(factory=dict, init=False)

    def __call__(self, *arguments: Any, workers: int) -> None:
        """Run the kernel; compile it first, or take it from disk, if this is the first call."""
        together = workers > 1
        if together not in self._compiled:
            self._compiled[together] = self._compile(*arguments, workers)
        with _exclusive() if together else _NOTHING:
            self._compiled[together](*arguments, workers)

    def _compile(self, *arguments: Any) -> Any:
        function = self.together if arguments[-1] > 1 else self.alone
        started = time.perf_counter()
        compiled = function.compile(tuple(map(numba.typeof, arguments)))
        _log.info("%s for %s: ready after %.1f s", function.__name__, arguments[0], time.perf_counter() - started)
        return compiled


def workers_for(jobs: int) -> int:
    """How many threads share so many jobs: as many as torch and numba both allow."""
    _start_threads()
    return max(1, min(torch.get_num_threads(), numba.get_num_threads(), jobs))


@functools.cache
def _start_threads() -> None:
    """Start numba's threads. Where it shares OpenMP with torch this sets torch's number too, so that is put back."""
    before = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(before)


@functools.cache
def _exclusive() -> contextlib.AbstractContextManager[object]:
    """What a kernel holds while its threads run: a lock, if those of several Python threads must not do so at once."""
    return _one_at_a_time if numba.threading_layer() == "workqueue" else _NOTHING
