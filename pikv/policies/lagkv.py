"""Tokens that stand out against the stretch that follows them."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.ports import TokenSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class LagKV(TokenSelector):
    """Keep, of each stretch of `lag` tokens, what spreads widest on the scale of the next. Source: arXiv 2504.04704.

    Beyond the sinks a row is cut into stretches of `lag` tokens. Keys and values are scaled by the least and the
    greatest of each channel in the next stretch; a token's spread is the standard deviation over channels, made a
    softmax over its stretch; the mean of keys' and values' is ranked within the stretch, so that all stretches keep
    the same share (section 2.2; kvpress's LagKVPress). The last whole stretch and what follows it have no next one,
    and stay; so does a row shorter than two stretches, the newer first.
    """

    lag: int = attrs.field(default=128, validator=at_least(2))
    sinks: int = attrs.field(default=4, validator=at_least(0))
    recent: int = attrs.field(default=32, validator=at_least(0))

    def score(self, view: TokenView) -> Tensor:
        """The rank within the stretch, from 0 to below 1; 1 for what stays: [sequences, kv_heads, tokens]."""
        counts = ((view.positions >= 0).sum(-1) - self.sinks) // self.lag  # whole stretches of each row
        stretches = int(counts.amax()) if counts.numel() else 0
        scores = torch.ones(view.positions.shape, device=view.positions.device)
        if stretches < 2:
            return scores
        scored = slice(self.sinks, self.sinks + (stretches - 1) * self.lag)
        followed = torch.arange(1, stretches, device=counts.device) < counts[..., None]
        ranks = self._spreads(view, stretches).argsort(stable=True, dim=-1).argsort(dim=-1) / self.lag
        scores[..., scored] = ranks.masked_fill(~followed[..., None], 1.0).flatten(2)
        return scores

    def _spreads(self, view: TokenView, stretches: int) -> Tensor:
        """Of keys and values together: [sequences, kv_heads, stretches - 1, lag]."""
        beyond = slice(self.sinks, self.sinks + stretches * self.lag)
        keys, values = (
            _spread(states[:, :, beyond].float().unflatten(2, (stretches, self.lag)))
            for states in (view.keys, view.values)
        )
        return keys + values


def _spread(states: Tensor) -> Tensor:
    """[.., stretches, lag, dim] -> [.., stretches - 1, lag]: the softmax of the deviations on the next one's scale."""
    least, most = states[:, :, 1:].amin(3, keepdim=True), states[:, :, 1:].amax(3, keepdim=True)
    scaled = (states[:, :, :-1] - least) / (most - least).clamp(min=1e-6)
    return scaled.std(-1).softmax(-1)
