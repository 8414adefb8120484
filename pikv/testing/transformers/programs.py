"""A hypothesis strategy: any mixture of what is done to a cache."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from pikv.testing.transformers.operations import Crop, Feed, Operation, Program, Reorder, Repeat, Select


@st.composite
def programs(draw: DrawFn, *, max_moves: int = 4) -> Program:
    """Moves of rows and columns between chunks of tokens, which have padding on either side or none."""
    first = batch = draw(st.sampled_from([3, 2, 1]))
    operations: list[Operation] = [draw(_feeds(batch))]
    columns = operations[0].tokens
    for _ in range(draw(st.integers(1, max_moves))):
        move = draw(_moves(batch, columns))
        batch = _rows_after(move, batch)
        feed = draw(_feeds(batch))
        columns += feed.tokens + _columns_of(move)
        operations += [move, feed]
    return Program(operations, first, draw(st.integers(0, 2**16)))


def _moves(batch: int, columns: int) -> SearchStrategy[Operation]:
    """What can be done to that many rows and columns; the batch stays below ten."""
    rows = st.integers(0, batch - 1)
    moves = [
        st.lists(rows, min_size=batch, max_size=batch).map(Reorder),
        st.lists(rows, min_size=1, max_size=batch).map(Select),
        _feeds(batch),
    ]
    if batch <= 3:
        moves.append(st.integers(1, 3).map(Repeat))
    if columns > 1:
        moves.append(st.integers(1, columns - 1).map(Crop))
    return st.one_of(moves)


def _rows_after(move: Operation, batch: int) -> int:
    if isinstance(move, Select):
        return len(move.rows)
    return batch * move.times if isinstance(move, Repeat) else batch


def _columns_of(move: Operation) -> int:
    if isinstance(move, Crop):
        return -move.tokens
    return move.tokens if isinstance(move, Feed) else 0


@st.composite
def _feeds(draw: DrawFn, batch: int) -> Feed:
    """A chunk in which each row has a token at least."""
    tokens = draw(st.sampled_from([1, 2, 5, 9, 17, 70]))
    padding = draw(st.just([]) | st.lists(st.integers(0, tokens - 1), min_size=batch, max_size=batch))
    return Feed(tokens, padding, draw(st.sampled_from(["left", "right"])))
