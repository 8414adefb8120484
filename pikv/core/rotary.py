"""Rotary position embedding: the one place that knows how keys and queries are rotated."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError


@attrs.frozen(kw_only=True)
class Rotary:
    """Rotate pairs of channels by an angle that grows with the position. Source: RoFormer, arXiv 2104.09864.

    frequencies: radians a position, one for each pair. start: the first channel that is rotated; those before and past
    the pairs stay. pairing: pair i is channels i and i + pairs ("halves", as in Llama and Mixtral) or 2 i and 2 i + 1
    ("neighbours", as in DeepSeek-V2). scaling: by which rotated channels grow (YaRN, arXiv 2309.00071, section 3.4).
    """

    frequencies: tuple[float, ...]
    start: int = 0
    pairing: Literal["halves", "neighbours"] = "halves"
    scaling: float = 1.0

    def __attrs_post_init__(self) -> None:
        if self.pairing not in ("halves", "neighbours"):
            raise ConfigError(f"pairing must be 'halves' or 'neighbours', got {self.pairing!r}")

    @classmethod
    def of(cls, *, dim: int, theta: float = 10_000.0) -> Rotary:
        """The first dim channels, pair i by theta ** (-2 i / dim) a position."""
        return cls(frequencies=tuple(theta ** (-i / dim) for i in range(0, dim, 2)))

    def apply(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return states [..., tokens, channels] rotated to positions [..., tokens] (broadcastable)."""
        return self._rotate(states, positions, direction=1.0, scaling=self.scaling)

    def remove(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return the states before rotation: the inverse of `apply`."""
        return self._rotate(states, positions, direction=-1.0, scaling=1 / self.scaling)

    def mean_rotation(self, first: Tensor, count: int, *, dim: int) -> Tensor:
        """The mean of the rotations to `count` positions from first int64 [...] on: float32 [..., dim, dim].

        `mean_rotation @ state` is the mean of the rotated states; dim: channels of a state.
        """
        positions = first[..., None] + torch.arange(count, device=first.device)
        units = torch.eye(dim, device=first.device).expand(*positions.shape, -1, -1)
        turned = self.apply(units, positions[..., None])  # [..., count, dim, dim]: a row is a rotated unit
        return turned.mean(-3).mT

    def _rotate(self, states: Tensor, positions: Tensor, *, direction: float, scaling: float) -> Tensor:
        frequencies = torch.tensor(self.frequencies, device=states.device)
        angles = positions.to(torch.float32)[..., None] * frequencies  # [..., tokens, pairs]
        cos, sin = scaling * angles.cos(), scaling * direction * angles.sin()
        dim = 2 * len(self.frequencies)
        before, rotated, after = states.float().split([self.start, dim, states.shape[-1] - self.start - dim], dim=-1)
        shape, axis = ((2, dim // 2), -2) if self.pairing == "halves" else ((dim // 2, 2), -1)
        first, second = rotated.unflatten(-1, shape).unbind(axis)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=axis).flatten(-2)
        return torch.cat([before, turned, after], dim=-1).to(states.dtype)
