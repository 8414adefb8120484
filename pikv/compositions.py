"""A composition in one line, for command lines and tables: `pyramid+snapkv(window=16)+int4@1/10`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, final

import attrs
import torch

from pikv.compose import NUMBERS, PARTS, build
from pikv.core.config import LayerConfig, ModelConfig
from pikv.core.errors import ConfigError, UnknownNameError
from pikv.core.ports import PageSelector
from pikv.core.runtime import RuntimeConfig


@final
@attrs.frozen
class Composition:
    """Parts by name, as `pikv.runtime_from` takes them, and the share of the full cache's bytes that they may take.

    text: what it was read from, and what tables call it. share: sealed pages with their indexes, of the bytes of all
    keys and values in the model's dtype; the tail comes on top. None without a limit.
    """

    text: str
    names: Mapping[str, Any]
    share: Fraction | None = None

    def names_for(self, model: ModelConfig, tokens: int) -> dict[str, Any]:
        """The names, with the `budget_tokens` that the share amounts to for texts of so many tokens.

        Raises ConfigError for a composition that cannot work.
        """
        names = dict(self.names)
        if self.share is not None:
            names["budget_tokens"] = _budget(names, self.share, model, tokens)
        return names


def parse(text: str) -> Composition:
    """Read parts joined by `+`, each a name, or a name with settings, or a number by its key; and perhaps `@share`.

    `exact`, `quest(pages=8)+int8`, `snapkv+int4+page_size=16+tail_tokens=32@1/10`, `h2o@0.1`. What kind of part a name
    is follows from the name.

    Raises UnknownNameError for a name that no part has, ConfigError for what cannot be read, or is said twice.
    """
    body, at, share = text.strip().partition("@")
    names: dict[str, Any] = {}
    for item in _items(body):
        kind, value = _named(item)
        if kind in names:
            raise ConfigError(f"{text!r} names two of {kind}: {names[kind]} and {value}; leave one out")
        names[kind] = value
    return Composition(text.strip(), names, _share(text, share) if at else None)


def _items(body: str) -> Iterator[str]:
    """What stands between the `+` that are not within parentheses."""
    yield from (item.strip() for item in re.split(r"\+(?![^(]*\))", body))


def _named(item: str) -> tuple[str, Any]:
    """The kind of a part and what describes it, or the key of a number and the number."""
    problem = (
        f"{item!r} must be a part's name, perhaps with settings as in quest(pages=8), or a number as in page_size=16"
    )
    try:
        call = ast.parse(f"f({item})", mode="eval").body
    except SyntaxError as error:
        raise ConfigError(problem) from error
    assert isinstance(call, ast.Call)
    if [keyword.arg for keyword in call.keywords] in [[key] for key in NUMBERS] and not call.args:
        return call.keywords[0].arg or "", _value(call.keywords[0].value, problem)
    if len(call.args) != 1 or call.keywords:
        raise ConfigError(problem)
    return _part(call.args[0], problem)


def _part(node: ast.expr, problem: str) -> tuple[str, Any]:
    settings = {}
    if isinstance(node, ast.Call) and not node.args:
        settings = {keyword.arg: _value(keyword.value, problem) for keyword in node.keywords}
        node = node.func
    if not isinstance(node, ast.Name):
        raise ConfigError(problem)
    kinds = [kind for kind, known in PARTS.items() if node.id in known]
    if not kinds:
        everything = ", ".join(f"{kind}: {', '.join(sorted(known))}" for kind, known in PARTS.items())
        raise UnknownNameError(f"no part is called {node.id!r}; there are {everything}")
    return kinds[0], {"name": node.id, **settings} if settings else node.id


def _value(node: ast.expr, problem: str) -> Any:
    """A number, a text, or a part within a part, by its name."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ConfigError(problem) from error


def _share(text: str, share: str) -> Fraction:
    try:
        read = Fraction(share.strip())
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{text!r}: what follows @ must be a share such as 1/10 or 0.1, got {share!r}") from error
    if not 0 < read <= 1:
        raise ConfigError(f"{text!r}: the share must be above 0 and at most 1, got {share}")
    return read


def _budget(names: Mapping[str, Any], share: Fraction, model: ModelConfig, tokens: int) -> int:
    if "budget_tokens" in names:
        raise ConfigError(f"a share and budget_tokens={names['budget_tokens']} say the same thing; leave one out")
    defaults = attrs.fields_dict(RuntimeConfig)
    page_size = names.get("page_size", defaults["page_size"].default)
    tail_tokens = names.get("tail_tokens", defaults["tail_tokens"].default)
    compressor, selector = build("compressor", names.get("compressor", "exact")), names.get("page_selector")
    index = None if selector is None else build("page_selector", selector)
    forms = RuntimeConfig(compressor=compressor, page_size=page_size).forms(model)
    a_page_each = sum(
        layer.kv_heads * (form.stride + _index_bytes(index, layer, page_size))
        for layer, form in zip(model.layers, forms, strict=True)
    )
    return int(share * full_bytes(model, tokens) / a_page_each) * page_size + tail_tokens


def full_bytes(model: ModelConfig, tokens: int) -> int:
    """Keys and values of one sequence in a full cache: a window keeps what it shows, latents are there once."""
    return sum(
        layer.kv_heads
        * (layer.key_dim + (layer.value_dim if layer.values == "stored" else 0))
        * model.dtype.itemsize
        * (tokens if layer.window is None else min(tokens, layer.window))
        for layer in model.layers
    )


def _index_bytes(selector: PageSelector | None, layer: LayerConfig, page_size: int) -> int:
    if selector is None:
        return 0
    form = selector.index_form(layer, page_size)
    return int(torch.Size(form.shape).numel()) * form.dtype.itemsize
