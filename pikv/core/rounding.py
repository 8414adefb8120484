"""How a budget is shared out in whole pages: clamped, redistributed, and summing to what was asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_INTERVALS = 32
_ROUNDS = 7  # each leaves one of the intervals; what 32**7 of them leave open is interpolated
_NEGLIGIBLE_PAGES = 2.0**-20  # fractions that differ by less are equal, whatever the last bits of a sum


def apportion(weights: Tensor, total: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
    """Share `total` out in proportion to `weights`, each part between its floor and its ceiling.

    weights: positive, [..., n]. total: int64 [...]. floor, ceiling: int64 [..., n], floor <= ceiling.
    Returns int64 [..., n] whose sum is clamp(total, sum(floor), sum(ceiling)), exactly. What a clamp takes or gives
    is redistributed in proportion; fractions go by largest remainder, equal ones to the first.
    """
    weights = weights.double()
    return apportion_along(
        lambda level: level[..., None] * weights[..., None, :],
        low=torch.zeros(total.shape, dtype=torch.float64, device=total.device),
        high=(ceiling / weights).amax(-1),
        total=total,
        floor=floor,
        ceiling=ceiling,
    )


def apportion_along(
    profile: Callable[[Tensor], Tensor], *, low: Tensor, high: Tensor, total: Tensor, floor: Tensor, ceiling: Tensor
) -> Tensor:
    """Share `total` out by the one of a family of profiles that, clamped to floor and ceiling, sums to it.

    profile: turns levels float64 [..., m] into shares [..., m, n], each continuous in its level and never falling with
    it. low, high: float64 [...], the levels where no share is above its floor, and none below its ceiling.
    The rest as in `apportion`: what a clamp takes or gives moves the level of all. Equal limits keep the order of the
    profile's shares.
    """
    total = total.clamp(floor.sum(-1), ceiling.sum(-1))
    least, most = floor[..., None, :].double(), ceiling[..., None, :].double()
    steps = torch.linspace(0, 1, _INTERVALS + 1, dtype=torch.float64, device=total.device)
    low, high = low[..., None], high[..., None]
    for _ in range(_ROUNDS):
        levels = torch.lerp(low, high, steps)
        enough = profile(levels).clamp(least, most).sum(-1) <= total[..., None]
        last = (enough.sum(-1, keepdim=True) - 1).clamp(0, _INTERVALS - 1)
        low, high = levels.gather(-1, last), levels.gather(-1, last + 1)
    below, above = profile(torch.cat([low, high], dim=-1)).clamp(least, most).unbind(-2)
    missing, span = total - below.sum(-1), (above - below).sum(-1)
    part = (missing / span).nan_to_num().clamp(0, 1)  # NaN where both ends are what was asked for
    return _whole(torch.lerp(below, above, part[..., None]), total)


def _whole(exact: Tensor, total: Tensor) -> Tensor:
    """Round shares [..., n] that sum to total to int64, by largest remainder; equal remainders go to the first."""
    exact = (exact / _NEGLIGIBLE_PAGES).round() * _NEGLIGIBLE_PAGES
    shares = exact.floor()
    rank = (exact - shares).argsort(stable=True, dim=-1, descending=True).argsort(dim=-1)
    shares = shares.long()
    return shares + (rank < (total - shares.sum(-1))[..., None])
