"""What happens to a layer after it has been read: windows slide, budgets are kept, full pages are sealed.

What leaves is decided first, then new pages are encoded and room is made in the pool, and only then anything changes:
whatever raises leaves the layer as it was.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from pikv.core import sealing
from pikv.core.errors import PoolFullError, StateError
from pikv.core.eviction import Candidates, choose
from pikv.core.layer import NEVER, LayerCache
from pikv.core.ports.full_pool import FullPool
from pikv.core.ports.selector import PageSelector, QueryTokenSelector, TokenSelector
from pikv.core.tables import ABSENT
from pikv.core.tail import EMPTY


@attrs.define
class _Kept:
    """What stays: pages bool [sequences, kv_heads, pages], tail tokens bool [sequences, kv_heads, width]."""

    pages: Tensor
    tail: Tensor

    @classmethod
    def all_of(cls, layer: LayerCache) -> _Kept:
        return cls(
            layer.table.ids[..., : layer.table.width] != ABSENT,
            layer.tail.positions[..., : layer.tail.width].cpu() != EMPTY,
        )


def settle(
    layer: LayerCache,
    *,
    selector: TokenSelector,
    budget_tokens: Tensor | None,
    tail_tokens: int | None,
    page_selector: PageSelector | None,
    when_full: FullPool,
) -> None:
    """Slide the layer's window, evict to budget_tokens int64 [sequences, kv_heads], seal all but tail_tokens.

    budget_tokens: None evicts nothing. tail_tokens: None seals nothing. Raises PoolFullError, nothing changed.
    """
    over = budget_tokens is not None and bool((occupied_tokens(layer) > budget_tokens).any())
    if layer.config.window is not None or over or _pages_to_seal(layer.tail.lengths, layer, tail_tokens).any():
        kept = _Kept.all_of(layer)
        _slide(layer, kept)
        if over and budget_tokens is not None:
            _check_asked(layer, selector)
            _evict(layer, kept, selector, budget_tokens)
        counts = _pages_to_seal(kept.tail.sum(-1), layer, tail_tokens)
        sealed = sealing.encode(layer, kept.tail, counts, page_selector) if bool(counts.any()) else None
        with layer.pool.locked():
            _make_room(layer, kept, int(counts.sum()), when_full)
            _drop(layer, kept)
            if sealed is not None:
                sealing.store(layer, sealed)
            _forget(layer)
    layer.settled = True


def _check_asked(layer: LayerCache, selector: TokenSelector) -> None:
    if isinstance(selector, QueryTokenSelector) and not layer.asked:
        raise StateError(
            f"layer {layer.layer_id}: {type(selector).__name__} scores tokens by the queries that attend to them, and "
            "the last update was not followed by attend; call attend, or compose a selector that needs no queries "
            "(Recent)"
        )


def occupied_tokens(layer: LayerCache) -> Tensor:
    """The tokens that each row takes room for, int64 [sequences, kv_heads]: a page counts whole."""
    return layer.table.counts * layer.page_size + layer.tail.lengths


def _pages_to_seal(lengths: Tensor, layer: LayerCache, tail_tokens: int | None) -> Tensor:
    """The whole pages that lie beyond the newest tail_tokens of each row."""
    if tail_tokens is None:
        return torch.zeros_like(lengths)
    return ((lengths - tail_tokens) // layer.page_size).clamp(min=0)


def _slide(layer: LayerCache, kept: _Kept) -> None:
    """Leave out the pages that no later query sees, and the tail tokens once they would fill a page."""
    bound = layer.unseen_from_now_on()
    if bound is None:
        return
    kept.pages &= layer.table.newest[..., : layer.table.width] > bound[:, None, None]
    stale = kept.tail & (layer.tail.positions[..., : layer.tail.width].cpu() <= bound[:, None, None])
    if stale.numel() and int(stale.sum(-1).amax()) >= layer.page_size:
        kept.tail &= ~stale


def _evict(layer: LayerCache, kept: _Kept, selector: TokenSelector, budget_tokens: Tensor) -> None:
    """Leave out what scores lowest until each row is within its budget."""
    view = layer.view()
    present = view.positions != EMPTY
    slots = kept.pages.repeat_interleave(layer.page_size, dim=-1)
    present &= torch.cat([slots, kept.tail], dim=-1).to(present.device)
    age = present.flip(-1).cumsum(-1).flip(-1)  # 1 for the newest present token, 2 for the one before
    first = (layer.first + selector.sinks)[:, None, None].to(present.device)
    candidates = Candidates(
        scores=selector.score(view),
        present=present,
        protected=(view.positions < first) | (age <= selector.recent),
        pages=layer.table.width,
        page_size=layer.page_size,
    )
    kept.pages, kept.tail = (chosen.cpu() for chosen in choose(candidates, budget_tokens))


def _make_room(layer: LayerCache, kept: _Kept, count: int, when_full: FullPool) -> None:
    """Raise unless the pool will have room for `count` pages; when_full may give up more of the layer's pages."""
    pool, form = layer.pool, layer.codec.form
    ids, newest = (states[..., : layer.table.width] for states in (layer.table.ids, layer.table.newest))

    def missing() -> int:
        return count - pool.free_pages(form) - pool.freed_by(ids[~kept.pages & (ids != ABSENT)])

    if missing() <= 0:
        return
    leaving = when_full.leaving(newest.masked_fill(~kept.pages, ABSENT), missing())
    if leaving is not None:
        kept.pages = kept.pages & ~leaving
    if missing() > 0:
        raise PoolFullError(
            f"pool: layer {layer.layer_id} must seal {count} pages of {form.stride} bytes and {missing()} of them do "
            f"not fit in capacity_bytes={pool.capacity_bytes} ({type(when_full).__name__}); raise it, give the layers "
            "a budget_tokens, drop sequences, or compose when_full=EvictOldest()"
        )


def _drop(layer: LayerCache, kept: _Kept) -> None:
    """Let go of what is not kept."""
    layer.keep_pages(kept.pages)
    if not bool(kept.tail.all()):
        layer.tail.keep(kept.tail.to(layer.tail.keys.device))


def _forget(layer: LayerCache) -> None:
    """Clear the slots that the window has passed, those of pages sealed just now included."""
    bound = layer.unseen_from_now_on()
    if bound is not None:
        layer.forgotten = torch.maximum(layer.forgotten, bound)
        if layer.table.width:
            layer.clear_slots(layer.slot_positions() > bound[:, None, None, None])


def crop(layer: LayerCache, end: Tensor) -> None:
    """Forget every token at a position >= end, int64 [sequences]."""
    if layer.table.width:
        layer.clear_slots(layer.slot_positions() < end[:, None, None, None])
        layer.keep_pages(layer.table.live[..., : layer.table.width] != 0)
    stored = layer.tail.positions[..., : layer.tail.width]
    layer.tail.keep(stored < end[:, None, None].to(stored.device))
    layer.last = torch.minimum(layer.last, end - 1)
    layer.first = layer.first.masked_fill(layer.first >= end, NEVER)
    layer.seen = torch.minimum(layer.seen, end)
    layer.queried, layer.settled = layer.queried[:, :0], True
