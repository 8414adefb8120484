"""What happens to a layer after it has been read: windows slide, budgets are kept, full pages are sealed.

What leaves is decided first, then room is made in the pool and new pages are encoded, and only then anything changes:
whatever raises leaves the layer as it was.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from pikv.core import sealing, showing
from pikv.core.attended import Attended
from pikv.core.budget import Share
from pikv.core.errors import PoolFullError, StateError
from pikv.core.eviction import Candidates, choose
from pikv.core.exact import Refuse
from pikv.core.layer import NEVER, LayerCache
from pikv.core.ports.backend import SealKernel
from pikv.core.ports.full_pool import FullPool
from pikv.core.ports.selector import AttendedTokenSelector, QueryTokenSelector, SecondPassSelector, TokenSelector
from pikv.core.tables import ABSENT
from pikv.core.tail import EMPTY
from pikv.core.views import TokenView


@attrs.define(kw_only=True)
class Decision:
    """What settling will do to a layer.

    pages: bool [sequences, kv_heads, pages], tail: bool [sequences, kv_heads, width], both what stays, on the CPU.
    seals: int64 [sequences, kv_heads], how many pages the oldest of the staying tail tokens will fill. split: int64 of
    the same shape, the tokens that the rows were given by scores; see LayerCache.
    """

    layer: LayerCache
    pages: Tensor
    tail: Tensor
    seals: Tensor
    split: Tensor

    @property
    def missing_bytes(self) -> int:
        """By how much the layer's pages will grow; negative if they shrink."""
        table, pool = self.layer.table, self.layer.pool
        ids = table.ids[..., : table.width]
        freed = pool.freed_by(ids[~self.pages & (ids != ABSENT)])
        return (int(self.seals.sum()) - freed) * self.layer.codec.form.stride


def decide(
    layer: LayerCache,
    *,
    selector: TokenSelector,
    share: Share | None,
    tail_tokens: int | None,
    split_by: TokenSelector | None = None,
    leading: Decision | LayerCache | None = None,
) -> Decision | None:
    """Slide the layer's window, evict to its share of the budget, seal all but tail_tokens.

    share: None evicts nothing. tail_tokens: None seals nothing. split_by: whose scores split the share among the heads,
    where they do and it is not the selector's. leading: the layer whose tokens this one keeps, or what will be done to
    it, in the place of the selector's scores. Changes nothing. Returns None if there is nothing to do, as at most
    decoded tokens; what it costs to find that out does not grow with the context. A window slides a page at a time.
    """
    over = share is not None and share.exceeded(layer.occupied(), layer.split)
    seals = tail_tokens is not None and layer.tail.width >= tail_tokens + layer.page_size
    bound = layer.unseen_from_now_on()
    slides = bound is not None and bool((bound >= layer.forgotten + layer.page_size).any())
    if not over and not seals and not slides:
        return None
    decision = Decision(
        layer=layer,
        pages=layer.table.ids[..., : layer.table.width] != ABSENT,
        tail=layer.tail.positions[..., : layer.tail.width].cpu() != EMPTY,
        seals=torch.zeros_like(layer.tail.lengths),
        split=layer.split,
    )
    _slide(decision)
    if over and share is not None:
        _evict(decision, selector, share, split_by, leading)
    if tail_tokens is not None:
        decision.seals = ((decision.tail.sum(-1) - tail_tokens) // layer.page_size).clamp(min=0)
    return decision


def make_room(decisions: list[Decision], when_full: FullPool) -> None:
    """See that the pool will have room for all decisions: known prefixes leave, then when_full may give up pages.

    Raises PoolFullError. The pool is locked by the caller, so that the room is still there when they are carried out.
    """
    taken = 0
    for decision in decisions:
        layer, pool = decision.layer, decision.layer.pool
        newest, stride = layer.table.newest[..., : layer.table.width], layer.codec.form.stride
        # Again if pages left that another cache holds too, which frees nothing.
        while (short := pool.used_bytes + taken + decision.missing_bytes - pool.total_bytes) > 0:
            if pool.prefixes.free(short):
                continue
            leaving = when_full.leaving(newest.masked_fill(~decision.pages, ABSENT), -(-short // stride))
            if leaving is None:
                limit = "capacity_bytes" if pool.residency is None else "the capacity_bytes of all tiers"
                evict = " or compose when_full=EvictOldest()" if isinstance(when_full, Refuse) else ""
                raise PoolFullError(
                    f"pool: layer {layer.layer_id} must seal {int(decision.seals.sum())} pages of {stride} bytes and "
                    f"{short} bytes are missing in {limit}={pool.total_bytes} ({type(when_full).__name__}); "
                    f"raise it, give the layers a budget_tokens, drop sequences{evict}"
                )
            decision.pages = decision.pages & ~leaving
        taken += decision.missing_bytes


def carry_out(decision: Decision, seal: SealKernel) -> None:
    """Encode, then change the layer. What raises leaves it as it was."""
    layer = decision.layer
    seals = bool(decision.seals.any())
    sealed = sealing.encode(layer, decision.tail, decision.seals, seal) if seals else None
    layer.split = decision.split
    if sealed is not None:
        layer.pool.make_near(layer.codec.form, len(sealed.pages))
    layer.keep_pages(decision.pages)
    if not bool(decision.tail.all()):
        layer.tail.keep(decision.tail.to(layer.tail.keys.device))
    if sealed is not None:
        sealing.store(layer, sealed)
    _forget(layer)


def _check_asked(layer: LayerCache, selector: QueryTokenSelector) -> None:
    if not layer.asked:
        raise StateError(
            f"layer {layer.layer_id}: {type(selector).__name__} scores tokens by the queries that attend to them, and "
            "the last update was not followed by attend; call attend, or compose a selector that needs no queries "
            "(Recent)"
        )


def _slide(decision: Decision) -> None:
    """Leave out the pages that no later query sees, and the tail tokens once they would fill a page."""
    layer, bound = decision.layer, decision.layer.unseen_from_now_on()
    if bound is None:
        return
    decision.pages &= layer.table.newest[..., : layer.table.width] > bound[:, None, None]
    stale = decision.tail & (layer.tail.positions[..., : layer.tail.width].cpu() <= bound[:, None, None])
    if stale.numel() and int(stale.sum(-1).amax()) >= layer.page_size:
        decision.tail &= ~stale


def _evict(
    decision: Decision,
    selector: TokenSelector,
    share: Share,
    split_by: TokenSelector | None,
    leading: Decision | LayerCache | None,
) -> None:
    """Leave out what scores lowest until each row is within its budget."""
    layer, positions = decision.layer, showing.slots(decision.layer)
    view, order = showing.view(layer)
    scores = _scores(layer, view, selector) if leading is None else _kept_by(leading, view)
    stays = torch.cat([decision.pages.repeat_interleave(layer.page_size, dim=-1), decision.tail], dim=-1)
    present = (positions != EMPTY) & stays.to(positions.device)
    age = present.flip(-1).cumsum(-1).flip(-1)  # 1 for the newest present token, 2 for the one before
    first = (layer.first + selector.sinks)[:, None, None].to(present.device)
    protected = (positions < first) | (age <= selector.recent)

    def by_slot(scores: Tensor) -> Tensor:
        return torch.zeros(positions.shape, dtype=torch.float64, device=scores.device).scatter(
            -1, order, scores.double()
        )

    budget_tokens = share.even
    if share.by_scores is not None:
        splitting = by_slot(scores if split_by is None else _scores(layer, view, split_by))
        budget_tokens = share.split(splitting.masked_fill(~present | protected, -torch.inf), layer.split)
        decision.split = budget_tokens
    candidates = Candidates(
        scores=by_slot(scores),
        present=present,
        protected=protected,
        pages=layer.table.width,
        page_size=layer.page_size,
    )
    decision.pages, decision.tail = (kept.cpu() for kept in choose(candidates, budget_tokens))


_REHEARSE = "run the model on the text again within cache.rehearsal(), before finish_prefill or the first answer"


def _scores(layer: LayerCache, view: TokenView, selector: TokenSelector) -> Tensor:
    """What the selector says of the tokens of a view, shown as many queries as it asks for."""
    if isinstance(selector, QueryTokenSelector):
        _check_asked(layer, selector)
        view = view.with_newest(selector.window)
    if isinstance(selector, AttendedTokenSelector) and view.attended is None:
        raise StateError(
            f"layer {layer.layer_id}: {type(selector).__name__} scores tokens by the attention that it has seen, and "
            "there was none; " + (_REHEARSE if isinstance(selector, SecondPassSelector) else "call attend")
        )
    scores = selector.score(view)
    if scores.device.type == "cpu" and bool(scores.masked_fill(view.positions == EMPTY, 0.0).isnan().any()):
        raise StateError(
            f"layer {layer.layer_id}: {type(selector).__name__} scored a token NaN; a score must say whether a token "
            "stays, so mend its score()"
        )
    return scores


def _kept_by(leading: Decision | LayerCache, view: TokenView) -> Tensor:
    """1 for the tokens of a view that another layer keeps in the same row, 0 for the others."""
    if isinstance(leading, Decision):
        pages = leading.pages.repeat_interleave(leading.layer.page_size, dim=-1)
        kept, positions = torch.cat([pages, leading.tail], dim=-1), showing.slots(leading.layer)
        positions = positions.masked_fill(~kept.to(positions.device), EMPTY)
    else:
        positions = showing.slots(leading)
    ordered = positions.masked_fill(positions == EMPTY, torch.iinfo(torch.int32).max).sort(dim=-1).values
    return Attended.of(ordered, torch.ones_like(ordered)).at(view.positions)


def _forget(layer: LayerCache) -> None:
    """Clear the slots that the window has passed, those of pages sealed just now included."""
    bound = layer.unseen_from_now_on()
    if bound is not None:
        layer.forgotten = torch.maximum(layer.forgotten, bound)
        if layer.table.width:
            layer.clear_slots(showing.slot_positions(layer) > bound[:, None, None, None])


def crop(layer: LayerCache, end: Tensor) -> None:
    """Forget every token at a position >= end, int64 [sequences]."""
    if layer.table.width:
        layer.clear_slots(showing.slot_positions(layer) < end[:, None, None, None])
        layer.keep_pages(layer.table.live[..., : layer.table.width] != 0)
    stored = layer.tail.positions[..., : layer.tail.width]
    layer.tail.keep(stored < end[:, None, None].to(stored.device))
    layer.last = torch.minimum(layer.last, end - 1)
    layer.first = layer.first.masked_fill(layer.first >= end, NEVER)
    layer.seen = torch.minimum(layer.seen, end)
    layer.forgotten = torch.minimum(layer.forgotten, end - 1)
    if layer.newest_queries is not None:
        layer.newest_queries = layer.newest_queries.cropped(end)
    if layer.attended is not None:
        layer.attended = layer.attended.cropped(end)
    layer.queried, layer.settled, layer.answer = layer.queried[:, :0], True, None
