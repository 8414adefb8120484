"""How functions are compiled: no bounds, no exceptions for a division by 0, no GIL."""

from __future__ import annotations

from typing import Any

import numba

COMPILED = {"error_model": "numpy", "nogil": True}
PART = {**COMPILED, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # called from compiled code only

part: Any = numba.njit(**PART)
"""A part of a kernel, compiled with it."""

inlined: Any = numba.njit(inline="always", **PART)
"""The same, put in the place of each call: for few lines, which are quicker to compile so."""
