"""What a kernel does with a page, whatever its encoding; each encoding has a file that says how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba.extending import overload

from pikv.adapters.numba_cpu.compiled import PART
from pikv.adapters.numba_cpu.static import Static

F = TypeVar("F", bound=Callable[..., Any])


def score_keys(keys: Any, shape: Any, page: int, ahead: int, query: int, scores: int) -> None:
    """Write the scores of `shape.rows` queries with each token of a page.

    keys: how they are stored, shape.keys. page, ahead: addresses of the page, and of one that is read later. query:
    of float32 [rows, key_dim]; scores: of float32 [rows, page_size].
    """
    raise NotImplementedError("a part of compiled code, where `does` has one for each encoding")


def add_values(values: Any, shape: Any, page: int, ahead: int, tokens: int, weights: int, states: int) -> None:
    """Add the values of the first `tokens` tokens of a page, weighted, to the sums of `shape.rows` queries.

    values: how they are stored, shape.values. weights: of float32 [rows, page_size]. states: of `rows` queries.
    """
    raise NotImplementedError("a part of compiled code, where `does` has one for each encoding")


def does(part: Callable[..., Any], *field_classes: type) -> Callable[[F], F]:
    """Let a function do `part` in compiled code where keys or values are stored as a field of these classes."""

    def register(implementation: F) -> F:
        @overload(part, jit_options=PART, strict=False)
        def choose(field: Any, *rest: Any) -> F | None:
            return implementation if isinstance(field, Static) and type(field.value) in field_classes else None

        return implementation

    return register
