"""What settings are checked by when they are made: validators and converters of attrs fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import attrs

from pikv.core.errors import ConfigError
from pikv.core.ports import Compressor


def positive(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    """A validator: a whole number from 1 on."""
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{attribute.name} must be a positive whole number, got {value!r}")


def optional_positive(instance: object, attribute: attrs.Attribute[int | None], value: int | None) -> None:
    """A validator: None, or a whole number from 1 on."""
    if value is not None:
        positive(instance, attribute, value)  # type: ignore[arg-type]  # the optional attribute, checked as a plain one


def is_a(port: type) -> Callable[[object, attrs.Attribute[Any], object], None]:
    """A validator: None where that is the default, or an object of the port."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, port) and not (value is None and attribute.default is None):
            raise ConfigError(
                f"{attribute.name} must be a {port.__name__} object, got {value!r}; names go through pikv.runtime_from"
            )

    return check


def one_or_many(value: Compressor | Iterable[Compressor]) -> Compressor | tuple[Compressor, ...]:
    """A converter: a list of compressors becomes a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else cast(Compressor, value)  # the validator looks at it


def compressors(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A validator: one Compressor, or one for each layer."""
    for each in value if isinstance(value, tuple) and value else (value,):
        is_a(Compressor)(instance, attribute, each)
