"""Which pages the next layer will choose."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports.demotion import PagePredictor


@final
@attrs.frozen
class AsLastStep(PagePredictor):
    """The next layer will choose what it chose for the token before."""

    def foresee(self, now: Tensor, last: Tensor | None) -> Tensor | None:
        """The layer's own last choice."""
        return last


@final
@attrs.frozen
class AsThisLayer(PagePredictor):
    """The next layer will choose what this layer chose just now."""

    def foresee(self, now: Tensor, last: Tensor | None) -> Tensor | None:
        """This layer's choice."""
        return now
