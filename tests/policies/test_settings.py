"""Settings of policies are checked when they are made."""

from __future__ import annotations

import attrs
import pytest

import pikv
from pikv import policies

OWN = [part for name in policies.__all__ if (part := getattr(policies, name)).__module__.startswith("pikv.policies")]
COUNTS = [
    (part, field.name)
    for part in OWN
    if attrs.has(part)
    for field in attrs.fields(part)
    if field.init and field.type in ("int", int)
]


@pytest.mark.parametrize("count", [-1, 1.5, float("nan"), "4"])
@pytest.mark.parametrize(("part", "name"), COUNTS, ids=[f"{part.__name__}.{name}" for part, name in COUNTS])
def test_counts_are_whole_numbers(part, name, count):
    """A setting that is a count takes whole numbers only, none below 0."""
    needed = {field.name: 2 for field in attrs.fields(part) if field.default is attrs.NOTHING}
    with pytest.raises(pikv.ConfigError, match=name):
        part(**{**needed, name: count})


def test_the_counts_are_found():
    """The test above has counts to try, of selectors and of others."""
    assert {(policies.Recent, "sinks"), (policies.Quest, "pages"), (policies.Eplb, "slots")} <= set(COUNTS)
