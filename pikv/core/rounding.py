"""How a budget is shared out in whole pages: clamped, redistributed, and summing to what was asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def apportion(weights: Tensor, total: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
    """Share `total` out in proportion to `weights`, each part between its floor and its ceiling.

    weights: positive, [..., n]. total: int64 [...]. floor, ceiling: int64 [..., n], floor <= ceiling.
    Returns int64 [..., n] whose sum is clamp(total, sum(floor), sum(ceiling)), exactly. What a clamp takes or gives
    is redistributed in proportion; fractions go by largest remainder, equal ones to the first.
    """
    total = total.clamp(floor.sum(-1), ceiling.sum(-1))
    exact = _water_level(weights.double(), total, floor, ceiling)
    shares = exact.floor().long().clamp(floor, ceiling)
    while bool((missing := total - shares.sum(-1)).any()):
        growing = missing[..., None] > 0
        movable = torch.where(growing, shares < ceiling, shares > floor)
        remainder = torch.where(growing, exact - shares, shares - exact).masked_fill(~movable, -torch.inf)
        order = remainder.argsort(stable=True, dim=-1, descending=True)
        rank = order.argsort(dim=-1)
        step = (rank < missing.abs()[..., None]) & movable
        shares = shares + torch.where(growing, 1, -1) * step
    return shares


def _water_level(weights: Tensor, total: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
    """Real shares clamp(level * weights, floor, ceiling) that sum to total, up to the last bit of the level."""
    low = torch.zeros_like(total, dtype=torch.float64)
    high = (ceiling / weights).amax(-1) + 1.0
    for _ in range(100):  # halves an interval of at most 2**64 down to one bit of a double
        level = (low + high) / 2
        over = torch.clamp(level[..., None] * weights, floor, ceiling).sum(-1) > total
        low, high = torch.where(over, low, level), torch.where(over, level, high)
    return torch.clamp(low[..., None] * weights, floor, ceiling)
