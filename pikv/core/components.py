"""What a cache is composed of, as JSON can say it: kept with a commit, and compared when it is restored."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch

from pikv.core.config import ModelConfig
from pikv.core.errors import ConfigError
from pikv.core.runtime import RuntimeConfig

_BYTES = ("model", "page_size", "compressor", "forms", "place")
"""What decides what the stored bytes mean, and which tokens they are of."""

_POLICIES = (
    "token_selector",
    "page_selector",
    "allocator",
    "router",
    "sharding",
    "when_full",
    "budget_tokens",
    "tail_tokens",
)
"""What decides how a cache goes on from what is stored."""


def described(part: object) -> Any:
    """A component by its name and the fields that it is compared by; numbers, texts and sequences as they are."""
    if part is None or isinstance(part, (bool, int, float, str)):
        return part
    if isinstance(part, torch.dtype):
        return str(part)
    if isinstance(part, (tuple, list)):
        return [described(each) for each in part]
    if isinstance(part, torch.Tensor):
        return part.tolist()
    name, module = type(part).__qualname__, type(part).__module__
    named = {"name": name if module.startswith("pikv.") else f"{module}.{name}"}
    kind = type(part)
    if attrs.has(kind):
        named |= {field.name: described(getattr(part, field.name)) for field in attrs.fields(kind) if field.eq}
    return named


def composition(model: ModelConfig, runtime: RuntimeConfig) -> dict[str, Any]:
    """The model and the components of a cache. Backends, tiers and the device are left out: they change no token."""
    layers, forms = itertools.groupby(model.layers), zip(model.layers, runtime.forms(model), strict=True)
    transport = runtime.transport
    said = {
        "model": {
            "layers": [[len(list(same)), described(layer)] for layer, same in layers],
            "dtype": str(model.dtype),
            "experts": model.experts,
            "experts_per_token": model.experts_per_token,
        },
        "forms": [described(form) for (_, form), _ in itertools.groupby(forms)],
        "place": [0, 1] if transport is None else [transport.rank, transport.size],
    }
    return {name: said.get(name, described(getattr(runtime, name, None))) for name in (*_BYTES, *_POLICIES)}


def check_same(stored: Mapping[str, Any], now: Mapping[str, Any], may_differ: Iterable[str]) -> None:
    """Raise ConfigError if a component is not what it was when the commit was made, unless it may differ."""
    allowed = set(may_differ)
    if not allowed <= set(_POLICIES):
        raise ConfigError(
            f"may_differ must name policies, any of {', '.join(_POLICIES)}, got {sorted(allowed)}; what decides the "
            f"meaning of stored bytes ({', '.join(_BYTES)}) must be the same"
        )
    for name in (*_BYTES, *_POLICIES):
        if stored.get(name) != now[name] and name not in allowed:
            hint = f"or may_differ=({name!r},) to go on with another" if name in _POLICIES else "the bytes are for it"
            raise ConfigError(
                f"{name} must be what it was when the version was committed, {stored.get(name)}, got {now[name]}; "
                f"compose the same, {hint}"
            )
