"""Which pages go far first."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports.demotion import Demotion, PageUse


@final
@attrs.frozen
class LeastOftenRead(Demotion):
    """Pages that queries have chosen least often go first: where pages are selected, those least attended to."""

    def warmth(self, use: PageUse) -> Tensor:
        """How often each was read."""
        return use.reads


@final
@attrs.frozen
class FurthestLayer(Demotion):
    """Pages of the layer whose turn comes last go first: the best order where layers read everything, one by one."""

    def warmth(self, use: PageUse) -> Tensor:
        """Minus the turns until the page's layer comes again; 0 for the next layer."""
        return -((use.layers - use.now - 1) % use.layer_count)
