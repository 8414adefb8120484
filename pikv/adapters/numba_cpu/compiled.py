"""How functions are compiled: no bounds, no exceptions for a division by 0, no GIL, and kept on disk."""

from __future__ import annotations

from typing import Any

import numba

INLINED = {"error_model": "numpy", "nogil": True}  # of parts of a kernel, which are compiled with it
compiled: Any = numba.njit(**INLINED)
