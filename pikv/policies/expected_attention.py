"""What queries to come are expected to attend to."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.ports import NeedsRotary, QueryTokenSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class ExpectedAttention(QueryTokenSelector, NeedsRotary):
    """Keep what queries like the newest ones would attend to from later positions. Source: arXiv 2510.00636.

    With mean mu and covariance S of the last `window` queries before rotation, and R the mean rotation over the next
    `future` positions: softmax(k^T R mu / sqrt(d) + k^T R S R^T k / 2d), the mean over the group's heads, times |v|.
    The sinks are left out of the softmax. kvpress's ExpectedAttentionPress takes the statistics over all of the prompt;
    a window costs its bytes in every layer, so it is a setting.
    """

    window: int = attrs.field(default=128, validator=at_least(1))
    future: int = attrs.field(default=512, validator=at_least(1))
    sinks: int = attrs.field(default=4, validator=at_least(0))
    recent: int = attrs.field(default=32, validator=at_least(0))

    def score(self, view: TokenView) -> Tensor:
        """The expected attention times |v|: [sequences, kv_heads, tokens]."""
        mean, covariance = self._statistics(view)
        keys = view.keys.float()[:, :, None]  # [sequences, kv_heads, 1, tokens, dim], for each head of the group
        scale = view.layer.scale
        expected = (keys @ mean[..., None])[..., 0] * scale
        expected = expected + ((keys @ covariance) * keys).sum(-1) * (scale**2 / 2)
        column = torch.arange(keys.shape[3], device=keys.device)
        left_out = (column < self.sinks) | (view.positions < 0)
        attention = expected.masked_fill(left_out[:, :, None], -torch.inf).softmax(-1).nan_to_num()
        lengths = view.values.float().norm(dim=-1)
        scores: Tensor = attention.mean(2) * lengths
        return scores.masked_fill(left_out, 0.0)

    def _statistics(self, view: TokenView) -> tuple[Tensor, Tensor]:
        """R mu [sequences, kv_heads, group, dim] and R S R^T [.., dim, dim] of each query head."""
        assert view.queries is not None  # core shows a QueryTokenSelector its queries
        assert view.asked is not None  # and where they stood
        assert view.layer.rotary is not None  # NeedsRotary: refused otherwise
        rotary, asked = view.layer.rotary, view.asked.to(view.queries.device)
        there = (asked >= 0).float()[:, None, :, None]
        queries = rotary.remove(view.queries.float(), asked[:, None])
        count = there.sum(2, keepdim=True).clamp(min=1)
        mean = (queries * there).sum(2, keepdim=True) / count
        apart = (queries - mean) * there
        covariance = apart.mT @ apart / count
        turns = rotary.mean_rotation(asked.amax(1) + 1, self.future, dim=queries.shape[-1])[:, None]
        mean, covariance = mean @ turns.mT, turns @ covariance @ turns.mT
        shape = (-1, view.layer.group)
        return mean[:, :, 0].unflatten(1, shape), covariance.unflatten(1, shape)
