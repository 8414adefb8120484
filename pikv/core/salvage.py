"""Salvage: a version of which pages are missing or damaged, until what they held has been computed again."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core import layers, restoring
from pikv.core.cache import PiKVCache
from pikv.core.checkpoint import streamer_of
from pikv.core.config import ModelConfig
from pikv.core.errors import InputError, StateError
from pikv.core.lost import LostPage, lost_pages, lost_tokens
from pikv.core.modes import keeps_numbers
from pikv.core.pool import PagePool
from pikv.core.ports import Manifest, Version
from pikv.core.reports import LostTokens
from pikv.core.runtime import RuntimeConfig
from pikv.core.tables import all_live


@attrs.frozen(kw_only=True)
class Gap:
    """Tokens of a sequence to read again: those at positions from first on, before stop."""

    sequence: int
    first: int
    stop: int
    pages: tuple[LostPage, ...]


@final
class Salvage:
    """What is left of a version. `gap` says what to read again; when it is None, `cache` is whole.

    For each gap, in turn: take `before(gap)`, give it the gap's tokens by `update` and `attend` in all layers, in as
    many calls as you like, and hand it to `fill`. Keys and values that go before are read as they are stored, so with
    exact pages what is filled in is what was lost, up to the rounding of another order of sums.

    why_whole: why nothing less than reading all tokens again, into a new cache, will do; None where gaps can be filled.
    lost: the tokens whose keys and values were lost. manifest: of the version.
    """

    def __init__(self, cache: PiKVCache, manifest: Manifest, keys: Iterable[int]) -> None:
        self._cache, self.manifest = cache, manifest
        self._pages = pages = lost_pages(manifest, keys)
        self.lost: tuple[LostTokens, ...] = lost_tokens(pages)
        self.why_whole = self._why_whole()
        for page in pages:  # so that what is made of this cache for `before` leaves them out
            cache._layers[page.layer_id].table.live[page.sequence, page.kv_head, page.page] = 0

    @classmethod
    @keeps_numbers
    def of(
        cls,
        model: ModelConfig,
        runtime: RuntimeConfig,
        version: Version | None = None,
        *,
        pool: PagePool | None = None,
        may_differ: Iterable[str] = (),
    ) -> Salvage:
        """Of a version of the runtime's streamer, the newest by default. Raises as PiKVCache.restore does.

        DamagedError only where the document or the states are damaged: then nothing can be salvaged.
        """
        streamer = streamer_of(runtime)
        version = streamer.newest() if version is None else version
        cache, keys = PiKVCache(model, runtime, pool=pool), list[int]()
        restored, cache._prefilling = restoring.restore(
            model, runtime, cache.pool, cache._served, version, may_differ, keys
        )
        cache._layers.update(restored)
        return cls(cache, streamer.manifest(version), keys)

    def _why_whole(self) -> str | None:
        runtime, held = self._cache.runtime, self._cache._layers
        if not self._pages:
            return None
        if self._cache.evicts:
            return "tokens leave the cache, so those after a lost page cannot be computed as they were"
        if runtime.transport is not None:
            return "the cache is one of several that share its tokens"
        if any(layer.basis is not None for layer in held.values()):
            return "pages are written in a basis of what came first"
        for page in self._pages:
            layer = held[page.layer_id]
            live = int(layer.table.live[page.sequence, page.kv_head, page.page])
            if live != all_live(layer.page_size) or page.last + self._beyond > int(layer.last[page.sequence]):
                return "tokens of a lost page were cropped"
        return None

    @property
    def _beyond(self) -> int:
        """How many tokens must follow a page for it to be sealed."""
        return max(1, self._cache.runtime.token_selector.recent)

    @property
    def gap(self) -> Gap | None:
        """The next one to fill, of pages that follow one another; None if there is none.

        Raises StateError where gaps cannot be filled.
        """
        if not self._pages:
            return None
        if self.why_whole is not None:
            raise StateError(f"the lost tokens cannot be filled in: {self.why_whole}; read all tokens again")
        first = min(self._pages, key=lambda page: (page.sequence, page.first))
        last, taken = first.last, list[LostPage]()
        for page in sorted(self._pages, key=lambda page: (page.sequence, page.first)):
            if page.sequence == first.sequence and page.first <= last + 1:
                taken.append(page)
                last = max(last, page.last)
        return Gap(sequence=first.sequence, first=first.first, stop=last + 1 + self._beyond, pages=tuple(taken))

    @keeps_numbers
    def before(self, gap: Gap) -> PiKVCache:
        """A cache of the gap's sequence alone, of the tokens before the gap; it shares the pool and the pages."""
        runtime = attrs.evolve(self._cache.runtime, tail_tokens=self._beyond)
        part, index = PiKVCache(self._cache.model, runtime, pool=self._cache.pool), torch.tensor([gap.sequence])
        held = self._cache._layers.items()
        layers.replace(part._layers, {i: functools.partial(layers.select, layer, index) for i, layer in held})
        part.crop(gap.first)
        return part

    @keeps_numbers
    def fill(self, gap: Gap, part: PiKVCache) -> None:
        """Take the gap's pages from the cache that `before` gave and that has read its tokens since.

        Raises InputError, and takes none, if it has not read them.
        """
        part.finish_prefill()
        found = [_page_of(part, page) for page in gap.pages]
        for page, page_id in zip(gap.pages, found, strict=True):
            self._cache._layers[page.layer_id].replace_page((page.sequence, page.kv_head, page.page), page_id)
        self._pages = [page for page in self._pages if page not in gap.pages]

    @property
    def cache(self) -> PiKVCache:
        """The cache, whole. Raises StateError while there are gaps."""
        if self._pages:
            raise StateError(
                f"{len(self._pages)} pages are still lost, the first {self._pages[0]}; fill the gaps first"
            )
        return self._cache


def _page_of(part: PiKVCache, lost: LostPage) -> Tensor:
    """The id of the page that holds what a lost one held, int32 [1]."""
    table = part._layers[lost.layer_id].table
    (columns,) = torch.nonzero(table.newest[0, lost.kv_head, : table.width] == lost.last, as_tuple=True)
    if not len(columns):
        raise InputError(f"{lost}: the cache that was given has not read these tokens; give it all of the gap's")
    return table.ids[0, lost.kv_head, columns]
