"""How a layer is read: sealed pages by a backend's kernel, the tail by torch, merged by log-sum-exp."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pikv.core import attention, fused
from pikv.core.attention import Partial
from pikv.core.config import LayerConfig
from pikv.core.layer import PADDING, LayerCache
from pikv.core.page_reads import ReadCounter, left_out
from pikv.core.places import Places
from pikv.core.ports.backend import Choice, ChooseKernel, Pages, StepKernel
from pikv.core.ports.selector import MassSelector, PageSelector
from pikv.core.prefetch import Prefetcher
from pikv.core.serving import Served
from pikv.core.tail import EMPTY

SCORES_AT_ONCE = 1 << 21  # entries of the mask that a prompt's attention holds at a time, where it needs one


def attend(
    layer: LayerCache,
    served: Served,
    query: Tensor,
    positions: Tensor,
    reads: ReadCounter,
    prefetcher: Prefetcher | None = None,
) -> Partial:
    """Attention over the stored tokens of a layer.

    query [sequences, kv_heads, group, tokens, key_dim] at positions int64 [sequences, tokens], the last update's.
    reads: has the selector of the sealed pages that a query of one token reads, if any, and counts them; a prompt reads
    all. The Partial has the shape [sequences, kv_heads, group, tokens, ...]. Sealed pages are older than every
    query, so causality concerns the tail only.

    prefetcher: is told what the layer reads, before attention runs. Pages that are read stay near meanwhile.
    """
    residency = layer.pool.residency
    if residency is None:
        return _attend(layer, served, query, positions, reads, None)
    with layer.pool.locked(), residency.reading():
        return _attend(layer, served, query, positions, reads, prefetcher)


def _attend(
    layer: LayerCache,
    served: Served,
    query: Tensor,
    positions: Tensor,
    reads: ReadCounter,
    prefetcher: Prefetcher | None,
) -> Partial:
    if isinstance(served.attend, StepKernel) and query.shape[3] == 1:
        pages = _pages_to_read(layer, served, query, positions, reads, prefetcher) if layer.table.width else None
        step = served.attend.step(query[:, :, :, 0], pages, layer.tail, oldest=_window(layer, positions))
        return Partial(step.output.unsqueeze(3), step.log_sum_exp.unsqueeze(3))
    parts = [_attend_tail(layer, query, positions)]
    if layer.table.width:
        pages = _pages_to_read(layer, served, query, positions, reads, prefetcher)
        folded = served.attend(query.flatten(2, 3), pages, oldest=_oldest(layer, positions))
        parts.append(_unfold(folded, query))
    return attention.merge(parts)


def answer(
    layer: LayerCache,
    served: Served,
    queries: Tensor,
    places: Places,
    reads: ReadCounter,
    prefetcher: Prefetcher | None,
) -> Tensor:
    """Attention over what all places store: [sequences, query_heads, tokens, value_dim] in the queries' dtype.

    queries: [sequences, query_heads, tokens, key_dim] of the last update's tokens, of the heads stored here; padding
    that stands nowhere gets 0.
    """
    grouped = queries.unflatten(1, (layer.config.kv_heads, layer.config.group))
    stored = attend(layer, served, grouped, layer.asked_from(), reads, prefetcher)
    try:
        merged = places.merged(stored)
    finally:
        if prefetcher is not None:
            prefetcher.finish()
    partial = with_sinks(places.model.layers[layer.layer_id], merged)
    output = partial.output.flatten(1, 2).to(queries.dtype)
    if layer.padded:
        output = output.masked_fill((layer.queried == PADDING)[:, None, :, None].to(output.device), 0)
    return output


def with_sinks(config: LayerConfig, partial: Partial) -> Partial:
    """The same with the layer's sink logits, which take their weight once however many places were merged."""
    if config.sinks is None:
        return partial
    logits = _sink_logits(config.sinks, partial.output.device).view(config.kv_heads, -1, 1)
    return attention.merge([partial, attention.sink(logits, like=partial)])


@functools.lru_cache(maxsize=1024)
def _sink_logits(sinks: tuple[float, ...], device: torch.device) -> Tensor:
    """One a query head; copied to the device once, not at every step."""
    return torch.tensor(sinks, device=device)


def _pages_to_read(
    layer: LayerCache,
    served: Served,
    query: Tensor,
    positions: Tensor,
    reads: ReadCounter,
    prefetcher: Prefetcher | None,
) -> Pages:
    selector = reads.selector
    if selector is None or served.choose is None or query.shape[3] != 1:
        pages = layer.pages()
        if selector is None and prefetcher is not None:
            prefetcher.everything(layer)
        return pages
    counter, stored = reads.layer(layer.layer_id), int(layer.table.counts.sum())
    fixed = not isinstance(selector, MassSelector) or selector.mass is None
    if layer.layer_id < selector.dense_layers or (fixed and layer.table.width <= selector.pages):
        counter.read_all(stored)
        if reads.audits:
            counter.audit(0.0)
        return layer.pages()
    choice = _choose(layer, served.choose, query, positions, selector)
    counter.read_some(choice, stored)
    if reads.audits:
        counter.audit(_left_out(layer, served, query, positions, choice))
    pages = layer.some_pages(choice)
    if prefetcher is not None:
        prefetcher.chosen(layer, choice)
    return pages


def _choose(
    layer: LayerCache, choose: ChooseKernel, query: Tensor, positions: Tensor, selector: PageSelector
) -> Choice:
    beside = None
    if isinstance(selector, MassSelector):
        beside = _attend_tail(layer, query, positions).log_sum_exp[..., 0]
    return choose(query[:, :, :, 0], layer.indexed_pages(), beside=beside)


def _left_out(layer: LayerCache, served: Served, query: Tensor, positions: Tensor, choice: Choice) -> Tensor:
    """What a choice truly leaves out: attention runs over everything for it."""
    pages, folded = layer.pages(), query.flatten(2, 3)
    page_lse = folded.new_empty((*folded.shape[:3], layer.table.width), dtype=attention.accumulator(query.dtype))
    whole = served.attend(folded, pages, oldest=_oldest(layer, positions), page_lse=page_lse)
    tail = _attend_tail(layer, query, positions).log_sum_exp[..., 0]
    return left_out(choice, page_lse, attention.finite(torch.logaddexp(whole.log_sum_exp, tail)))


def _oldest(layer: LayerCache, positions: Tensor) -> Tensor | None:
    """The oldest position that each query sees of the pages, or None if the live masks say it.

    They do when one token follows the last: settling cleared what its window leaves out.
    """
    oldest = _window(layer, positions)
    if oldest is not None and positions.shape[1] == 1 and bool((oldest[:, 0].cpu() <= layer.forgotten + 1).all()):
        return None
    return oldest


def _window(layer: LayerCache, positions: Tensor) -> Tensor | None:
    """The oldest position that each query sees, [sequences, group * tokens]; None if all see everything."""
    window = layer.config.window
    if window is None:
        return None
    return (positions - window + 1).repeat(1, layer.config.group).to(layer.tail.keys.device)


def _attend_tail(layer: LayerCache, query: Tensor, positions: Tensor) -> Partial:
    tokens, width = query.shape[3], layer.tail.width
    if tokens <= 1:
        return _attend_block(layer, query, positions, causal=False)
    if fused.serves(query, layer.config.softcap) and _in_order(layer, positions):
        return _attend_in_order(layer, query)
    at_once = max(1, SCORES_AT_ONCE // max(1, math.prod(query.shape[:3]) * width))
    blocks = [slice(start, start + at_once) for start in range(0, tokens, at_once)]
    parts = [_attend_block(layer, query[:, :, :, block], positions[:, block], causal=True) for block in blocks]
    return Partial(
        torch.cat([part.output for part in parts], dim=3), torch.cat([part.log_sum_exp for part in parts], dim=3)
    )


def _in_order(layer: LayerCache, positions: Tensor) -> bool:
    """Whether all rows end in the same new tokens, and every query sees all that is no newer than itself."""
    tail, tokens, window = layer.tail, positions.shape[1], layer.config.window
    if not tail.even or tail.width < tokens:
        return False
    newest = tail.positions[:, :, tail.width - tokens : tail.width]
    if not bool((newest == positions[:, None].to(newest)).all()):  # padding, or other places' tokens
        return False
    return window is None or bool((positions[:, -1] - layer.first < window).all())


def _attend_in_order(layer: LayerCache, query: Tensor) -> Partial:
    """What stood in the tail before is seen by every query; the new tokens see each other causally."""
    tokens, width, scale = query.shape[3], layer.tail.width, layer.config.scale
    old, new = slice(0, width - tokens), slice(width - tokens, width)
    keys, values = layer.tail.keys, layer.tail.values
    part = fused.attend_causal(query, keys[:, :, new], values[:, :, new], scale=scale)
    if width == tokens:
        return part
    before = fused.attend(query.flatten(2, 3), keys[:, :, old], values[:, :, old], scale=scale)
    return attention.merge([part, _unfold(before, query)])


def _unfold(folded: Partial, query: Tensor) -> Partial:
    """[sequences, kv_heads, group * tokens, ...] to [sequences, kv_heads, group, tokens, ...]."""
    shape = query.shape[2:4]
    return Partial(folded.output.unflatten(2, shape), folded.log_sum_exp.unflatten(2, shape))


def _attend_block(layer: LayerCache, query: Tensor, positions: Tensor, *, causal: bool) -> Partial:
    """One token a sequence sees all that the tail holds; of several, each sees what is no newer than itself."""
    width, (group, tokens) = layer.tail.width, query.shape[2:4]
    held = layer.tail.positions[:, :, None, :width]  # [sequences, kv_heads, 1, width]
    asked = positions.to(query.device)[:, None, :, None]  # [sequences, 1, tokens, 1]
    rules = []
    if not layer.tail.even:
        rules.append(held != EMPTY)
    if causal:
        rules.append(held <= asked)
    if layer.config.window is not None:
        rules.append(held > asked - layer.config.window)
    mask = None
    if rules:
        mask = rules[0]
        for rule in rules[1:]:
            mask = mask & rule
        mask = mask.expand(-1, -1, tokens, -1).repeat(1, 1, group, 1)
    keys, values = layer.tail.keys[:, :, :width], layer.tail.values[:, :, :width]
    run = fused.attend if causal else attention.attend  # for one query the kernel would cost more than it saves
    part = run(query.flatten(2, 3), keys, values, scale=layer.config.scale, softcap=layer.config.softcap, mask=mask)
    return _unfold(part, query)
