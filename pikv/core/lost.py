"""Lost pages: what the pages of a version held that a store has no more, or not as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor

from pikv.core.ports.streamer import Manifest
from pikv.core.reports import LostTokens


@attrs.frozen(kw_only=True, order=True)
class LostPage:
    """A page by its place: its number in its row, the oldest being 0. first, last: the positions that it may hold.

    What is known of a page that cannot be read is its last position, and that it begins after the page before.
    """

    layer_id: int
    sequence: int
    kv_head: int
    page: int
    first: int
    last: int
    key: int

    def __str__(self) -> str:
        return (
            f"page {self.page} of layer {self.layer_id}, sequence {self.sequence}, KV head {self.kv_head}: "
            f"tokens {self.first} to {self.last}, key {self.key}"
        )


def lost_pages(manifest: Manifest, keys: Iterable[int]) -> list[LostPage]:
    """Where a version has the pages of these keys, in the order of places; a shared page has several."""
    lost = torch.tensor(list(keys), dtype=torch.int64)
    layers = sorted(map(int, manifest.facts.get("layers", {})))
    return [page for layer_id in layers for page in _of_layer(manifest, layer_id, lost)] if len(lost) else []


def _of_layer(manifest: Manifest, layer_id: int, lost: Tensor) -> Iterator[LostPage]:
    names, newest = (manifest.states[f"layers.{layer_id}.table.{field}"] for field in ("ids", "newest"))
    first = torch.cat([torch.zeros_like(newest[..., :1]), newest[..., :-1] + 1], dim=-1)
    first = torch.maximum(first, manifest.states[f"layers.{layer_id}.forgotten"][:, None, None] + 1)
    for place in torch.isin(names, lost).nonzero().tolist():
        sequence, kv_head, page = place
        yield LostPage(
            layer_id=layer_id,
            sequence=sequence,
            kv_head=kv_head,
            page=page,
            first=int(first[sequence, kv_head, page]),
            last=int(newest[sequence, kv_head, page]),
            key=int(names[sequence, kv_head, page]),
        )


def lost_tokens(pages: Iterable[LostPage]) -> tuple[LostTokens, ...]:
    """The tokens of lost pages, those of all KV heads together."""
    spans = sorted({(page.layer_id, page.sequence, page.first, page.last) for page in pages})
    return tuple(LostTokens(layer_id=layer, sequence=row, first=first, last=last) for layer, row, first, last in spans)
