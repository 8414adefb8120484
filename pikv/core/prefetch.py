"""Prefetcher: fetches the pages that the next layer is foreseen to choose, while this one attends."""

from __future__ import annotations

import functools

import attrs
import torch
from torch import Tensor

from pikv.core.layer import LayerCache
from pikv.core.overlap import PREFETCH, Overlap
from pikv.core.ports.backend import Choice
from pikv.core.ports.demotion import PagePredictor
from pikv.core.tables import ABSENT

_NO_COLUMN = 1 << 40  # past every table


@attrs.define
class Foresight:
    """How well a predictor has done. Pages, counted once a step: foreseen, chosen, and both."""

    foreseen: int = 0
    chosen: int = 0
    both: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of chosen pages that had been foreseen; 0 before any."""
        return self.both / max(1, self.chosen)

    @property
    def precision(self) -> float:
        """The share of foreseen pages that were chosen; 0 before any."""
        return self.both / max(1, self.foreseen)


@attrs.define
class Prefetcher:
    """Of one cache. layers: the cache's own, by number. overlap: during whose collectives it begins; None: at once."""

    predictor: PagePredictor
    layers: dict[int, LayerCache]
    overlap: Overlap | None = None
    foresight: Foresight = attrs.field(factory=Foresight, init=False)
    _last: dict[int, Tensor] = attrs.field(factory=dict, init=False)
    _foreseen: dict[int, Tensor] = attrs.field(factory=dict, init=False)

    @classmethod
    def of(
        cls, predictor: PagePredictor | None, layers: dict[int, LayerCache], overlap: Overlap | None
    ) -> Prefetcher | None:
        """None without a predictor."""
        return None if predictor is None else cls(predictor, layers, overlap)

    def chosen(self, layer: LayerCache, choice: Choice) -> None:
        """Note what a layer reads now, and begin to fetch for the next."""
        self._reads(layer, choice.columns.masked_fill(choice.unread(), _NO_COLUMN).cpu())

    def everything(self, layer: LayerCache) -> None:
        """The same where a layer reads all its pages."""
        rows = layer.table.counts.shape
        self._reads(layer, torch.arange(layer.table.width).expand(*rows, layer.table.width))

    def _reads(self, layer: LayerCache, columns: Tensor) -> None:
        self._count(layer, columns)
        self._last[layer.layer_id] = columns
        following = self.layers.get((layer.layer_id + 1) % (max(self.layers) + 1))
        if following is None or following is layer:
            return
        last = self._last.get(following.layer_id)
        foreseen = self.predictor.foresee(columns, last)
        if foreseen is not None and foreseen.shape[:2] == following.table.counts.shape:
            ids = page_ids(following, foreseen)
            self._foreseen[following.layer_id] = ids
            if self.overlap is None:
                _begin(following, ids)
            else:
                self.overlap.offer(PREFETCH, functools.partial(_begin, following, ids))

    def finish(self) -> None:
        """Begin what no collective was there for: pages that are foreseen now may be others' when the cache changes."""
        if self.overlap is not None:
            self.overlap.finish(PREFETCH)

    def _count(self, layer: LayerCache, columns: Tensor) -> None:
        foreseen = self._foreseen.pop(layer.layer_id, None)
        if foreseen is not None:
            now = page_ids(layer, columns)
            self.foresight.foreseen += len(foreseen)
            self.foresight.chosen += len(now)
            self.foresight.both += int(torch.isin(now, foreseen).sum())


def _begin(layer: LayerCache, ids: Tensor) -> None:
    """Begin to fetch pages of a layer."""
    residency = layer.pool.residency
    assert residency is not None
    with layer.pool.locked():
        residency.foresee(layer.codec.form, ids, layer.layer_id)


def page_ids(layer: LayerCache, columns: Tensor) -> Tensor:
    """The ids of the pages at columns int64 [sequences, kv_heads, n], those that there are: int32 [m], distinct."""
    width = layer.table.width
    ids: Tensor = layer.table.ids[..., :width].gather(-1, columns.clamp(max=max(0, width - 1)))
    held: Tensor = ids[(ids != ABSENT) & (columns < width)].unique()
    return held
