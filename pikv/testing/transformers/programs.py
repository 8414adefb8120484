"""A hypothesis strategy: any mixture of what is done to a cache."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from pikv.testing.transformers.operations import Crop, Feed, Operation, Program, Reorder, Repeat, Select


@st.composite
def programs(draw: DrawFn, *, max_operations: int = 6) -> Program:
    """Any mixture of operations, with padding on either side and chunks that are longer than a page."""
    first = batch = draw(st.integers(1, 3))
    operations: list[Operation] = [_feed(draw, batch)]
    columns = operations[0].tokens
    for _ in range(draw(st.integers(1, max_operations))):
        rows = st.integers(0, batch - 1)
        kind = draw(st.sampled_from([Feed, Feed, Reorder, Select, Repeat, Crop]))
        if kind is Reorder:
            operations.append(Reorder(draw(st.lists(rows, min_size=batch, max_size=batch))))
        elif kind is Select:
            operations.append(Select(draw(st.lists(rows, min_size=1, max_size=batch))))
            batch = len(operations[-1].rows)
        elif kind is Repeat and batch <= 2:
            operations.append(Repeat(draw(st.integers(1, 3))))
            batch *= operations[-1].times
        elif kind is Crop and columns > 1:
            operations.append(Crop(draw(st.integers(1, columns - 1))))
            columns -= operations[-1].tokens
        else:
            operations.append(_feed(draw, batch))
            columns += operations[-1].tokens
    return Program([*operations, Feed(1), Feed(2)], first, draw(st.integers(0, 2**16)))


def _feed(draw: DrawFn, batch: int) -> Feed:
    """A chunk in which each row has a token at least."""
    tokens = draw(st.sampled_from([1, 1, 2, 5, 9, 17, 70]))
    padding = draw(st.none() | st.lists(st.integers(0, tokens - 1), min_size=batch, max_size=batch))
    return Feed(tokens, padding or (), draw(st.sampled_from(["left", "right"])))
