"""Fetch stored pages or compute their tokens: MOONCAKE's inequality, and the rates that it asks about."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import TYPE_CHECKING, final

import attrs

from pikv.core.ports.fetching import Fetching, Offer

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig
    from pikv.core.layer import LayerCache

REMEMBERED = 9  # measurements, of which the median counts: a first one has kernels compiled
ATTENTION, LINEAR = 4, 22  # a and b of the paper


def flops_of(layer: LayerConfig, start: int, tokens: int) -> float:
    """What a layer computes for tokens from position `start` on: a d (pairs of tokens) + b d^2 (tokens).

    d: the channels of all query heads, which stand for the model's width. Source: MOONCAKE (arXiv 2407.00079),
    flops(n) = a n^2 d + b n d^2 a layer, a = 4 and b = 22.
    """
    width, stop = layer.query_heads * layer.key_dim, start + tokens
    return float(ATTENTION * width * (stop**2 - start**2) + LINEAR * width**2 * tokens)


@final
@attrs.frozen(kw_only=True)
class FetchIfFaster(Fetching):
    """Fetch where B / G > bytes / flops: bandwidth to compute rate, pages to what their tokens cost.

    With dense pages of p tokens from position 0 on, that is B / G > 2 d s / (gqa (a p d + b d^2)). Source: MOONCAKE
    (FAST'25). What has not been measured yet is fetched; so is every try_again-th offer, since a store that was slow
    once would never be measured again.
    """

    try_again: int = 16

    def accepts(self, offer: Offer) -> tuple[bool, str]:
        """Compare both sides."""
        if offer.bytes_a_second is None or offer.flops_a_second is None:
            return True, "bandwidth and compute rate have not both been measured yet"
        rates, costs = offer.bytes_a_second / offer.flops_a_second, offer.nbytes / offer.flops
        said = (
            f"B / G = {offer.bytes_a_second:.3g} B/s / {offer.flops_a_second:.3g} flop/s = {rates:.3g} bytes a flop, "
            f"and they have {offer.nbytes} B / {offer.flops:.3g} flop = {costs:.3g}"
        )
        if rates <= costs and offer.refused + 1 >= self.try_again:
            return True, f"{said}; it is time to measure again"
        return rates > costs, said


@final
@attrs.frozen
class FetchAlways(Fetching):
    """Fetch whatever there is."""

    def accepts(self, offer: Offer) -> tuple[bool, str]:
        """Yes."""
        return True, "all that is there is fetched"


def _remembered() -> deque[float]:
    return deque(maxlen=REMEMBERED)


@attrs.define(eq=False)
class Rates:
    """What fetching and computing have been measured to take, by the caches of a pool. refused: offers in a row."""

    refused: int = 0
    _bytes_a_second: deque[float] = attrs.field(factory=_remembered)
    _flops_a_second: deque[float] = attrs.field(factory=_remembered)

    def fetched(self, nbytes: int, seconds: float) -> None:
        """Note a read of a store that found something."""
        self._bytes_a_second.append(nbytes / seconds)

    def computed(self, flops: float, seconds: float) -> None:
        """Note what a model did from one layer's update to the next one's."""
        self._flops_a_second.append(flops / seconds)

    def offer(self, nbytes: int, flops: float) -> Offer:
        """An offer with what is known by now."""
        return Offer(
            nbytes=nbytes,
            flops=flops,
            bytes_a_second=statistics.median(self._bytes_a_second) if self._bytes_a_second else None,
            flops_a_second=statistics.median(self._flops_a_second) if self._flops_a_second else None,
            refused=self.refused,
        )


@attrs.define(eq=False)
class Stopwatch:
    """Measures how fast a model computes a prompt: from the update of one layer to that of the next."""

    rates: Rates
    _before: tuple[LayerCache, float] | None = None

    def update(self, layer: LayerCache) -> None:
        """A layer is about to be given the tokens that the one before it was given last."""
        now = time.perf_counter()
        if self._before is not None and self._before[0].layer_id + 1 == layer.layer_id:
            before, began = self._before
            counts = (before.queried >= 0).sum(-1).tolist()
            if max(counts) >= layer.page_size:  # a prompt: decoding is limited by memory
                spans = zip(before.last.tolist(), counts, strict=True)
                flops = sum(flops_of(before.config, last + 1 - count, count) for last, count in spans)
                self.rates.computed(flops, now - began)
        self._before = layer, now
