"""Rotary position embedding: the one place that knows how keys and queries are rotated."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor


@attrs.frozen(kw_only=True)
class Rotary:
    """Rotate pairs of channels by an angle that grows with the position. Source: RoFormer, arXiv 2104.09864.

    The pairs are (i, i + dim / 2), as in Llama and Mixtral. Channels past `dim` are left as they are.
    """

    dim: int
    theta: float = 10_000.0

    def apply(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return states [..., tokens, channels] rotated to positions [..., tokens] (broadcastable)."""
        return self._rotate(states, positions, direction=1.0)

    def remove(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return the states before rotation: the inverse of `apply`."""
        return self._rotate(states, positions, direction=-1.0)

    def _rotate(self, states: Tensor, positions: Tensor, *, direction: float) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=states.device) / self.dim
        angles = positions.to(torch.float32)[..., None] * self.theta**-exponents  # [..., tokens, dim / 2]
        cos, sin = angles.cos(), direction * angles.sin()
        first, second, rest = states.float().split([self.dim // 2, self.dim // 2, states.shape[-1] - self.dim], dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        return turned.to(states.dtype)
