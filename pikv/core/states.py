"""What a layer of a cache holds, taken apart into named tensors and what JSON can say, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from pikv.core.attended import Attended
from pikv.core.basis import Basis
from pikv.core.layer import LayerCache
from pikv.core.query_window import QueryWindow
from pikv.core.tables import PageTable
from pikv.core.tail import Tail

GIVEN = frozenset({"layer_id", "codec", "pool", "_pages", "_indexed_pages"})
"""The fields of a LayerCache that are not taken apart: what it is given, and what follows from the rest."""

_PARTS: dict[str, type[attrs.AttrsInstance]] = {
    part.__name__: part for part in (Tail, PageTable, QueryWindow, Attended, Basis)
}
_ON_DEVICE = (
    "tail.keys",
    "tail.own_values",
    "tail.positions",
    "newest_queries.queries",
    "attended.positions",
    "attended.weights",
    "basis.keys",
    "basis.values",
    "answer",
)


def taken_apart(owner: attrs.AttrsInstance, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and the tensors of an object, all its fields; tensors are named `name`.field and lie on the CPU."""
    facts: dict[str, Any] = {}
    states: dict[str, Tensor] = {}
    for field in attrs.fields(type(owner)):
        value, path = getattr(owner, field.name), f"{name}.{field.name}"
        if not field.init or (isinstance(owner, LayerCache) and field.name in GIVEN):
            continue
        if isinstance(value, Tensor):
            states[path] = _held(owner, value).cpu()
        elif type(value).__name__ in _PARTS:
            inner, more = taken_apart(value, path)
            facts[field.name] = {"part": type(value).__name__, "facts": inner}
            states |= more
        else:
            facts[field.name] = value
    return facts, states


def _held(owner: object, states: Tensor) -> Tensor:
    """Without the room past the longest row, [sequences, kv_heads, room, ...]."""
    return states.narrow(2, 0, owner.width) if isinstance(owner, (Tail, PageTable)) and states.dim() > 2 else states


def put_together(
    kind: type[attrs.AttrsInstance],
    facts: Mapping[str, Any],
    states: Mapping[str, Tensor],
    name: str,
    device: torch.device,
) -> dict[str, Any]:
    """The fields of an object of a kind, from what `taken_apart` made of one."""
    fields: dict[str, Any] = {}
    for field in attrs.fields(kind):
        path, fact = f"{name}.{field.name}", facts.get(field.name)
        if path in states:
            fields[field.name] = states[path].to(device) if path.endswith(_ON_DEVICE) else states[path]
        elif isinstance(fact, dict):
            part = _PARTS[fact["part"]]
            fields[field.name] = part(**put_together(part, fact["facts"], states, path, device))
        elif field.name in facts:
            fields[field.name] = fact
    return fields
