"""Means, differences and fronts, on scores that can be checked by hand."""

from __future__ import annotations

import attrs
import pytest

from pikv.evaluation.items import Item, Question, Task
from pikv.evaluation.report import on_front, row_of
from pikv.evaluation.run import Score
from pikv.evaluation.statistics import loss, quality

GOOD = Score(answers=4, right=4, bits=8.0, tokens=8, stored=1000.0, tail=0.0, read=1.0)
HALF = Score(answers=4, right=2, bits=24.0, tokens=8, stored=100.0, tail=20.0, read=0.5)
TASK = Task(name="t", items=(Item(context="abc", questions=(Question(prompt="", answer="d"),)),))


def test_quality():
    """Percent of all answers, or bits of all tokens."""
    assert quality([GOOD, HALF], "answers") == 75
    assert quality([GOOD, HALF], "bits") == 2


@pytest.mark.parametrize(("judged_by", "lost"), [("answers", 50.0), ("bits", 2.0)])
def test_a_loss_that_all_items_share_is_sure(judged_by, lost):
    """However items are drawn the difference is the same, so the interval has no width."""
    interval = loss([HALF] * 9, [GOOD] * 9, judged_by)
    assert interval.value == lost
    assert interval.half_width == 0


def test_a_loss_of_some_items_is_less_sure_the_fewer_there_are():
    """The interval narrows about as the root of the number of items."""
    few, many = (loss([GOOD, HALF] * n, [GOOD] * (2 * n), "answers") for n in (8, 128))
    assert few.value == many.value == 25
    assert 3 < few.half_width / many.half_width < 5


def test_a_row_counts_bytes_against_the_full_cache():
    """On the items that both have; what is read is of the sealed bytes."""
    row = row_of(TASK, "half", {0: HALF, 1: HALF, 7: GOOD}, {0: GOOD, 1: GOOD})
    assert row.items == 2
    assert (row.stored, row.tail, row.read) == (0.1, 0.02, 0.04)
    assert row.lost == 50


def test_the_front():
    """What nobody beats: not worse in one and better in the other."""
    base = row_of(TASK, "x", {0: HALF}, {0: GOOD})
    rows = [attrs.evolve(base, lost=lost, stored=stored) for lost, stored in [(0, 1), (0, 0.5), (5, 0.5), (9, 0.1)]]
    assert on_front(rows, "stored") == [False, True, False, True]
