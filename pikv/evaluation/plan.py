"""One cap in bytes, split by marginal loss: a page format for each layer, and pages for each of its heads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Self

import attrs

from pikv.core.errors import ConfigError


@attrs.frozen(kw_only=True)
class LayerLosses:
    """What one layer loses by a page format, and by cutting a head, with all else exact and whole; and its bytes.

    formats: the loss by each page format. heads: of each KV head the loss by the pages that it keeps; the fewest are
    the fewest that it may have. page_bytes: what a page takes in each format. fixed_bytes: what the layer takes beside
    its pages, in each format.
    """

    formats: tuple[float, ...]
    heads: tuple[Mapping[int, float], ...]
    page_bytes: tuple[int, ...]
    fixed_bytes: tuple[int, ...]

    def __attrs_post_init__(self) -> None:
        counts = {len(self.formats), len(self.page_bytes), len(self.fixed_bytes)}
        if counts != {len(self.formats)} or not self.formats or not self.heads or not all(self.heads):
            raise ConfigError(
                "losses must name one or more page formats, bytes for each of them, and of each head a loss for one or "
                f"more numbers of pages, got {self}"
            )


@attrs.frozen(kw_only=True)
class Plan:
    """A page format for each layer, pages for each of its heads, their bytes, and the loss that is expected."""

    formats: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    nbytes: int
    loss: float


@attrs.frozen
class _Choice:
    """One of the ways to keep a layer. pages: of all its heads together, beyond the fewest."""

    format: int
    pages: int
    nbytes: int
    loss: float


@attrs.frozen
class _Curve:
    """The ways to keep a layer. gives: the heads that get a page one after another. hull: those worth their bytes."""

    least: tuple[int, ...]
    gives: tuple[int, ...]
    choices: tuple[_Choice, ...]
    hull: tuple[_Choice, ...]

    @classmethod
    def of(cls, layer: LayerLosses) -> Self:
        """Each page goes to the head that gains most by it, in any format; then every format is an alternative."""
        least = tuple(min(head) for head in layer.heads)
        gains = [(-gain, head) for head, measured in enumerate(layer.heads) for gain in _gains(measured)]
        gains.sort()  # the most first; a head's own fall, so they stay in their order
        worst = sum(head[fewest] for head, fewest in zip(layer.heads, least, strict=True))
        losses = list(itertools.accumulate((gain for gain, _ in gains), initial=worst))
        choices = tuple(
            _Choice(i, pages, layer.fixed_bytes[i] + (sum(least) + pages) * layer.page_bytes[i], base + loss)
            for i, base in enumerate(layer.formats)
            for pages, loss in enumerate(losses)
        )
        hull = falling_hull([(choice.nbytes, choice.loss) for choice in choices])
        return cls(least, tuple(head for _, head in gains), choices, tuple(choices[i] for i in hull))

    def pages(self, choice: _Choice) -> tuple[int, ...]:
        """Of each head."""
        given = self.gives[: choice.pages]
        return tuple(fewest + given.count(head) for head, fewest in enumerate(self.least))


def falling_hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (cost, loss) on the lower convex hull, by rising cost and falling loss: their indices.

    Each next one costs more and loses less, and the loss saved for each unit of cost falls from one to the next.
    """
    hull: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if hull and points[i][1] >= points[hull[-1]][1]:
            continue  # as dear, and loses no less
        while len(hull) > 1 and _slope(points[hull[-2]], points[hull[-1]]) >= _slope(points[hull[-1]], points[i]):
            hull.pop()
        hull.append(i)
    return hull


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _gains(measured: Mapping[int, float]) -> list[float]:
    """What each page after the fewest saves; between numbers of pages that were measured the loss falls evenly."""
    points = sorted(measured.items())
    hull = [points[i] for i in falling_hull(points)]
    return [-_slope(a, b) for a, b in itertools.pairwise(hull) for _ in range(b[0] - a[0])]


def solve(layers: Sequence[LayerLosses], *, cap_bytes: int) -> Plan:
    """The plan with the least expected loss in `cap_bytes`, if losses add up; the same for the same losses.

    Steps along the layers' hulls are taken by the loss that they save for each byte, the most first, as long as they
    fit. What a layer saves for a byte falls along its hull, so after any number of steps no plan of as few bytes has
    less loss (the greedy solution of a separable convex problem; Fox, Operations Research 14, 1966). What is left, less
    than the next step takes, goes into the one change of a layer that saves most. So more bytes never give more loss.

    Raises ConfigError where the least that there is does not fit.
    """
    curves = [_Curve.of(layer) for layer in layers]
    chosen = [curve.hull[0] for curve in curves]
    room = cap_bytes - sum(choice.nbytes for choice in chosen)
    if room < 0:
        raise ConfigError(
            f"cap_bytes must be at least {cap_bytes - room}, the exact tails and the fewest pages in the smallest "
            f"format, got {cap_bytes}; raise it, or lower tail_tokens"
        )
    for _, layer, step in sorted(_steps(curves)):
        more = curves[layer].hull[step + 1]
        if more.nbytes - chosen[layer].nbytes > room:
            break
        room -= more.nbytes - chosen[layer].nbytes
        chosen[layer] = more
    _fill(curves, chosen, room)
    return Plan(
        formats=tuple(choice.format for choice in chosen),
        pages=tuple(curve.pages(choice) for curve, choice in zip(curves, chosen, strict=True)),
        nbytes=sum(choice.nbytes for choice in chosen),
        loss=sum(choice.loss for choice in chosen),
    )


def _steps(curves: Sequence[_Curve]) -> list[tuple[float, int, int]]:
    """All steps along the hulls: the change of loss for a byte, the layer, the step's number."""
    return [
        (_slope((a.nbytes, a.loss), (b.nbytes, b.loss)), layer, step)
        for layer, curve in enumerate(curves)
        for step, (a, b) in enumerate(itertools.pairwise(curve.hull))
    ]


def _fill(curves: Sequence[_Curve], chosen: list[_Choice], room: int) -> None:
    """Change the one layer where what fits into the room saves most; of equal changes the one of fewest bytes."""
    changes = [
        (choice.loss - chosen[layer].loss, choice.nbytes - chosen[layer].nbytes, layer, i)
        for layer, curve in enumerate(curves)
        for i, choice in enumerate(curve.choices)
        if choice.nbytes - chosen[layer].nbytes <= room
    ]
    saved, _, layer, i = min(changes)
    if saved < 0:
        chosen[layer] = curves[layer].choices[i]
