"""Kernels that take arrays, as Python calls them."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any, final

import attrs
import numba
import torch

from pikv.adapters.numba_cpu.kernel import _one_at_a_time

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
        shared = together and numba.threading_layer() == "workqueue"  # which several Python threads must not share
        with _one_at_a_time if shared else contextlib.nullcontext():
            self._compiled[together](*arguments, workers)

    def _compile(self, *arguments: Any) -> Any:
        function = self.together if arguments[-1] > 1 else self.alone
        started = time.perf_counter()
        compiled = function.compile(tuple(map(numba.typeof, arguments)))
        _log.info("%s for %s: ready after %.1f s", function.__name__, arguments[0], time.perf_counter() - started)
        return compiled


def workers_for(jobs: int) -> int:
    """How many threads share so many jobs: as many as torch and numba both allow."""
    return max(1, min(torch.get_num_threads(), numba.get_num_threads(), jobs))
