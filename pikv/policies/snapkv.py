"""What the end of the prompt attends to, and its neighbours."""

from __future__ import annotations

from typing import final

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from pikv.core.ports import QueryTokenSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class SnapKV(QueryTokenSelector):
    """Keep what the newest queries attend to, pooled over neighbours. Source: SnapKV, arXiv 2404.14469, section 4.

    The attention of the last `window` queries to the tokens before them, averaged over queries and the group's heads,
    then over the `kernel` tokens around each (an odd number). The window itself stays. Defaults are kvpress's; the
    paper's code pools by the maximum with a kernel of 7 and a window of 32.
    """

    window: int = attrs.field(default=64, validator=at_least(1))
    kernel: int = attrs.field(default=5, validator=at_least(1))
    sinks: int = attrs.field(default=4, validator=at_least(0))
    recent: int = attrs.field(default=attrs.Factory(lambda self: self.window, takes_self=True), init=False)

    def score(self, view: TokenView) -> Tensor:
        """The pooled mean: [sequences, kv_heads, tokens]; in the window, more than anywhere."""
        mass = view.mass() / (self.window * view.layer.group)  # the matrix's mean over queries and heads
        if not mass.shape[-1]:
            return mass
        in_window = view.positions >= _oldest_asked(view)[:, None, None]
        reach = self.kernel // 2
        summed = F.pad(mass.masked_fill(in_window, 0.0), (reach, reach)).unfold(-1, 2 * reach + 1, 1).sum(-1)
        return (summed / (2 * reach + 1)).masked_fill(in_window, 2.0)


def _oldest_asked(view: TokenView) -> Tensor:
    """The position of the oldest query in the window, [sequences]; beyond all positions where none was asked."""
    assert view.asked is not None  # core shows a QueryTokenSelector its queries
    beyond = torch.iinfo(torch.int64).max
    return view.asked.masked_fill(view.asked < 0, beyond).amin(-1).to(view.positions.device)
