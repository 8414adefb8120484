"""The split of a cap: by hand, against every split there is, and what holds for any losses."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.evaluation.plan import LayerLosses, falling_hull, solve

pytestmark = pytest.mark.property

# Two layers, of one and of two heads; a page takes 10 bytes in the coarse format and 20 in the fine one. What is worth
# its bytes, as bytes: loss (format, pages). First 5: 8 (1, 0), 15: 2.3 (0, 1), 35: .7 (0, 3), 65: .4 (1, 3); second
# 0: 7 (1, 0), 20: 3 (0, 2), 40: 1 (1, 2), 60: 0 (1, 3). The steps save .57 .08 .01 and .2 .1 .05 a byte.
FIRST = LayerLosses(formats=(0.3, 0.0), heads=({0: 8.0, 1: 2.0, 3: 0.4},), page_bytes=(10, 20), fixed_bytes=(5, 5))
SECOND = LayerLosses(
    formats=(2.0, 0.0), heads=({0: 1.0, 1: 0.0}, {0: 6.0, 2: 0.0}), page_bytes=(10, 20), fixed_bytes=(0, 0)
)


@pytest.mark.parametrize(
    ("cap", "formats", "pages", "nbytes", "loss"),
    [
        (5, (1, 1), ((0,), (0, 0)), 5, 15.0),  # nothing but the tails
        (15, (0, 1), ((1,), (0, 0)), 15, 9.3),
        (35, (0, 0), ((1,), (0, 2)), 35, 5.3),
        (34, (0, 0), ((1,), (0, 1)), 25, 8.3),  # a byte less than that step takes: the best that fits
        (55, (0, 1), ((1,), (0, 2)), 55, 3.3),
        (65, (0, 1), ((2,), (0, 2)), 65, 2.5),  # half of the next step fits
        (75, (0, 1), ((3,), (0, 2)), 75, 1.7),
        (95, (0, 1), ((3,), (1, 2)), 95, 0.7),
        (125, (1, 1), ((3,), (1, 2)), 125, 0.4),  # all there is
        (999, (1, 1), ((3,), (1, 2)), 125, 0.4),
    ],
)
def test_by_hand(cap, formats, pages, nbytes, loss):
    """What saves most a byte comes first: pages or a finer format."""
    plan = solve([FIRST, SECOND], cap_bytes=cap)
    assert (plan.formats, plan.pages, plan.nbytes) == (formats, pages, nbytes)
    assert plan.loss == pytest.approx(loss)


def test_a_hull_leaves_out_what_is_dearer_for_its_saving():
    """Points above a line between two others, and those that cost more and lose no less."""
    assert falling_hull([(0, 10), (1, 9), (2, 2), (2, 3), (3, 5), (6, 0)]) == [0, 2, 5]


def test_a_cap_below_the_least_is_refused():
    """With the least that there is."""
    with pytest.raises(pikv.ConfigError, match="at least 5,"):
        solve([FIRST, SECOND], cap_bytes=4)


@pytest.mark.parametrize("wrong", [{"formats": ()}, {"page_bytes": (1,)}, {"heads": ()}, {"heads": ({},)}])
def test_losses_that_do_not_fit_together_are_refused(wrong):
    """One number for each format, and something for each head."""
    with pytest.raises(pikv.ConfigError, match="losses must name"):
        LayerLosses(
            **{"formats": (0.0, 1.0), "heads": ({0: 1.0},), "page_bytes": (1, 2), "fixed_bytes": (0, 0)} | wrong
        )


@st.composite
def losses(draw, most_pages: int = 6) -> LayerLosses:
    """Measured with noise: a loss may rise with pages and with bits."""
    formats = draw(st.integers(1, 3))
    numbers = st.fractions(0, 10, max_denominator=4)  # so that sums are exact
    heads = st.dictionaries(st.integers(0, most_pages), numbers, min_size=1, max_size=4)
    return LayerLosses(
        formats=tuple(draw(numbers) for _ in range(formats)),
        heads=tuple(draw(st.lists(heads, min_size=1, max_size=3))),
        page_bytes=tuple(draw(st.integers(1, 30)) for _ in range(formats)),
        fixed_bytes=tuple(draw(st.integers(0, 30)) for _ in range(formats)),
    )


def expected(layer: LayerLosses, form: int, pages: tuple[int, ...]) -> float:
    """Losses added up, those of a head along the hull of what was measured."""
    total = layer.formats[form]
    for measured, count in zip(layer.heads, pages, strict=True):
        points = sorted(measured.items())
        hull = [points[i] for i in falling_hull(points)]
        ends = [(a, b) for a, b in itertools.pairwise(hull) if a[0] <= count <= b[0]]
        a, b = ends[0] if ends else (hull[-1], hull[-1])
        total += a[1] + (b[1] - a[1]) * (count - a[0]) / max(1, b[0] - a[0])
    return total


def every(layers: list[LayerLosses]) -> list[tuple[int, float]]:
    """Bytes and loss of every plan."""
    ways = []
    for layer in layers:
        ranges = [range(min(head), max(head) + 1) for head in layer.heads]
        ways.append(
            [
                (layer.fixed_bytes[form] + sum(pages) * layer.page_bytes[form], expected(layer, form, pages))
                for form in range(len(layer.formats))
                for pages in itertools.product(*ranges)
            ]
        )
    return [(sum(n for n, _ in each), sum(loss for _, loss in each)) for each in itertools.product(*ways)]


@given(layers=st.lists(losses(), min_size=1, max_size=4), caps=st.tuples(st.integers(0, 900), st.integers(0, 900)))
def test_more_bytes_never_lose_more(layers, caps):
    """And a plan says truly what it takes and is expected to lose, and keeps to its cap."""
    least = sum(
        min(f + sum(map(min, w.heads)) * p for f, p in zip(w.fixed_bytes, w.page_bytes, strict=True)) for w in layers
    )
    plans = [solve(layers, cap_bytes=least + cap) for cap in sorted(caps)]
    assert plans[1].loss <= plans[0].loss
    for plan, cap in zip(plans, sorted(caps), strict=True):
        each = list(zip(layers, plan.formats, plan.pages, strict=True))
        assert (
            plan.nbytes == sum(w.fixed_bytes[f] + sum(pages) * w.page_bytes[f] for w, f, pages in each) <= least + cap
        )
        assert plan.loss == sum(expected(*one) for one in each)


@given(layers=st.lists(losses(most_pages=3), min_size=1, max_size=2))
def test_no_plan_of_as_few_bytes_loses_less(layers):
    """Checked against every plan there is, for the caps where a step along the hulls ends."""
    plans = every(layers)
    for nbytes, loss in [plans[i] for i in falling_hull(plans)]:
        assert solve(layers, cap_bytes=nbytes).loss == loss
