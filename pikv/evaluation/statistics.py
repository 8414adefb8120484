"""How sure a mean is, and a difference of two: intervals by resampling items."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from pikv.evaluation.run import Score

RESAMPLES = 2000


@attrs.frozen
class Interval:
    """A value, and how far it may be off at 95 %: half the width of the interval."""

    value: float
    half_width: float


def quality(scores: Sequence[Score], judged_by: str) -> float:
    """Percent of the answers that are right, or bits a token."""
    if judged_by == "bits":
        return sum(score.bits for score in scores) / sum(score.tokens for score in scores)
    return 100 * sum(score.right for score in scores) / sum(score.answers for score in scores)


def loss(scores: Sequence[Score], full: Sequence[Score], judged_by: str, *, seed: int = 0) -> Interval:
    """What `scores` have lost against `full` on the same items: the difference of their qualities, and an interval.

    Positive is worse: points of percent, or bits a token. A paired bootstrap over items, whose answers depend on one
    another. Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    own, whole = (_columns(each, judged_by) for each in (scores, full))
    drawn = np.random.default_rng(seed).integers(len(own), size=(RESAMPLES, len(own)))
    sign = 1 if judged_by == "bits" else -100
    lost = sign * (_ratio(own[drawn]) - _ratio(whole[drawn]))
    low, high = np.percentile(lost, [2.5, 97.5])
    measured = sign * (_ratio(own[None]) - _ratio(whole[None]))[0]
    return Interval(float(measured) + 0.0, float(high - low) / 2)  # no -0.0


def _columns(scores: Sequence[Score], judged_by: str) -> np.ndarray:
    """What is summed up, and over how many: float64 [items, 2]."""
    if judged_by == "bits":
        return np.array([[score.bits, score.tokens] for score in scores], dtype=np.float64)
    return np.array([[score.right, score.answers] for score in scores], dtype=np.float64)


def _ratio(columns: np.ndarray) -> np.ndarray:
    """Of columns [draws, items, 2]: the ratio of the sums, [draws]."""
    sums = columns.sum(1)
    return np.asarray(sums[:, 0] / sums[:, 1])
