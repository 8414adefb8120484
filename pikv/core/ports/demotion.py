"""The demotion port: which resident pages go far when room is needed near. And the port of what is fetched ahead."""

from __future__ import annotations

import abc

import attrs
from torch import Tensor


@attrs.frozen(kw_only=True)
class PageUse:
    """How n resident pages have been used.

    read_at: int64 [n], when each was last read or written, by a clock that counts readings of layers. reads: int64 [n],
    how often. layers: int64 [n], the layer of each. now: the layer that needs room. layer_count: of the model.
    """

    read_at: Tensor
    reads: Tensor
    layers: Tensor
    now: int
    layer_count: int


class Demotion(abc.ABC):
    """Say how soon pages will be needed. Settings only."""

    @abc.abstractmethod
    def warmth(self, use: PageUse) -> Tensor:
        """Return [n]; the lowest go first, of equal ones the least recently read. Changes nothing."""


class PagePredictor(abc.ABC):
    """Foresee which pages the next layer will choose. Settings only."""

    @abc.abstractmethod
    def foresee(self, now: Tensor, last: Tensor | None) -> Tensor | None:
        """Return columns int64 [sequences, kv_heads, n] of the next layer's page table, or None for nothing.

        now: the columns int64 [sequences, kv_heads, m] that this layer has just chosen. last: those that the next layer
        chose in the step before, None before any.
        """
