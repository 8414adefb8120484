"""Kernels that take arrays, as Python calls them."""

from __future__ import annotations

import logging
import time
from typing import Any, final

import attrs
import numba

from pikv.adapters.numba_cpu.kernel import _alone

_log = logging.getLogger(__name__)


@final
@attrs.define
class Launch:
    """A compiled function that asks for the types of its arguments once: later calls must bring the same.

    Arrays must have the same type, number of dimensions and order as at the first call. Asking each time would take
    longer than a small kernel runs.
    """

    function: Any
    _entry: Any = attrs.field(default=None, init=False)

    def __call__(self, *arguments: Any) -> None:
        """Run it; compile it first, or take it from disk, if this is the first call."""
        if self._entry is None:
            started = time.perf_counter()
            self._entry = self.function.compile(tuple(map(numba.typeof, arguments)))
            _log.info("%s %s: ready after %.1f s", self.function.__name__, arguments[0], time.perf_counter() - started)
        with _alone():
            self._entry(*arguments)
