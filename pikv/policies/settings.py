"""Validators that the settings of policies share."""

from __future__ import annotations

from typing import Protocol

import attrs

from pikv.core.errors import ConfigError


class Validator(Protocol):
    """What attrs calls with the object, the field and its value."""

    def __call__(self, instance: object, field: attrs.Attribute[int], value: int) -> None:
        """Raise ConfigError for a value that cannot work."""


def at_least(least: int) -> Validator:
    """A validator for whole numbers from `least` on."""

    def check(instance: object, field: attrs.Attribute[int], value: int) -> None:
        if not isinstance(value, int) or value < least:
            raise ConfigError(
                f"{field.name} of {type(instance).__name__} must be a whole number of at least {least}, got {value!r}"
            )

    return check
