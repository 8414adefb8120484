"""PlainCache: what a PiKVCache that evicts nothing holds and answers, the slow and obvious way, in float64."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from pikv.core.cache import PiKVCache
from pikv.core.config import LayerConfig, ModelConfig


def attend(layer: LayerConfig, query: Tensor, asked: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention in float64, by the definition: [sequences, query_heads, queries, value_dim].

    query [sequences, query_heads, queries, key_dim] at positions asked [sequences, queries]; -1 is padding, which gets
    0, and -2 - p is padding that sees what a token at p would. keys [sequences, kv_heads, tokens, key_dim], values
    [..., value_dim], positions [sequences, kv_heads, tokens], -1 where there is no token.
    """
    grouped = query.double().unflatten(1, (layer.kv_heads, layer.group))  # [.., kv_heads, group, queries, key_dim]
    scores = layer.scale * grouped @ keys.double()[:, :, None].mT
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    at = torch.where(asked < -1, -2 - asked, asked)[:, None, None, :, None]
    held = positions[:, :, None, None, :]
    seen = (held >= 0) & (held <= at)
    if layer.window is not None:
        seen &= held > at - layer.window
    scores = scores.masked_fill(~seen, -torch.inf)
    if layer.sinks is not None:
        logits = torch.tensor(layer.sinks, dtype=torch.float64).view(layer.kv_heads, layer.group, 1, 1)
        scores = torch.cat([scores, logits.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1).nan_to_num(nan=0.0)[..., : keys.shape[2]]  # NaN where nothing is seen at all
    output = weights @ values.double()[:, :, None]
    return output.masked_fill(at < 0, 0.0).flatten(1, 2)


@attrs.frozen
class PlainRow:
    """The tokens of one sequence in one layer: positions [tokens], keys [kv_heads, tokens, key_dim], values.

    last: the newest position that the sequence has had, -1 before any.
    """

    positions: Tensor
    keys: Tensor
    values: Tensor
    last: int = -1

    def followed_by(self, positions: Tensor, keys: Tensor, values: Tensor) -> PlainRow:
        """The row with new tokens after it; padding is left out."""
        stored = positions >= 0
        return PlainRow(
            torch.cat([self.positions, positions[stored]]),
            torch.cat([self.keys, keys[:, stored]], dim=1),
            torch.cat([self.values, values[:, stored]], dim=1),
            last=max([self.last, *positions.tolist()]),
        )

    def cropped(self, end: int) -> PlainRow:
        """The row without the tokens at `end` and later."""
        kept = self.positions < end
        return PlainRow(self.positions[kept], self.keys[:, kept], self.values[:, kept], last=min(self.last, end - 1))


@attrs.define
class PlainCache:
    """A row for each layer and sequence. Its methods are those of PiKVCache, and check nothing."""

    model: ModelConfig
    rows: dict[int, list[PlainRow]] = attrs.field(factory=dict)

    def update(self, layer_id: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Take new tokens: positions [batch, tokens], k [batch, kv_heads, tokens, key_dim], v."""
        none = [PlainRow(positions[0, :0], keys[:, :0], values[:, :0]) for keys, values in zip(k, v, strict=True)]
        held = self.rows.get(layer_id, none)
        self.rows[layer_id] = [row.followed_by(*new) for row, *new in zip(held, positions, k, v, strict=True)]

    def attend(self, layer_id: int, q: Tensor, positions: Tensor) -> Tensor:
        """Attention of q [batch, query_heads, tokens, key_dim] at positions [batch, tokens], in float64."""
        layer = self.model.layers[layer_id]
        outputs = []
        for row, query, asked in zip(self.rows[layer_id], q, positions, strict=True):
            held = row.positions.expand(layer.kv_heads, -1)
            outputs.append(attend(layer, query[None], asked[None], row.keys[None], row.values[None], held[None]))
        return torch.cat(outputs)

    @property
    def sequences(self) -> int:
        """The batch."""
        return len(next(iter(self.rows.values()))) if self.rows else 0

    def last(self) -> Tensor:
        """The newest position that each sequence has had in any layer: int64 [batch]."""
        return torch.tensor([[row.last for row in rows] for rows in self.rows.values()]).amax(0)

    def fork(self) -> PlainCache:
        """A second cache that goes on from here."""
        return PlainCache(self.model, {layer_id: list(rows) for layer_id, rows in self.rows.items()})

    def reorder(self, ids: list[int]) -> None:
        """Make sequence i what sequence ids[i] is now."""
        self.rows = {layer_id: [rows[i] for i in ids] for layer_id, rows in self.rows.items() if ids}

    def drop(self, ids: list[int]) -> None:
        """Forget the sequences with these numbers."""
        self.reorder([i for i in range(self.sequences) if i not in ids])

    def join(self, other: PlainCache) -> None:
        """Add the sequences of another cache after this one's."""
        self.rows = {layer_id: self.rows.get(layer_id, []) + rows for layer_id, rows in other.rows.items()} or self.rows

    def crop(self, end: list[int]) -> None:
        """Forget every token at position end[sequence] or later."""
        for layer_id, rows in self.rows.items():
            self.rows[layer_id] = [row.cropped(first) for row, first in zip(rows, end, strict=True)]

    def reset(self) -> None:
        """Forget everything."""
        self.rows.clear()


def rounding(dtype: torch.dtype) -> dict[str, float]:
    """How near, as `assert_close` takes it, an answer comes to the plain one where values are a few at most.

    Half types: a prompt's softmax weights are rounded, and the output.
    """
    eps = torch.finfo(dtype).eps
    return {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2 * eps, "rtol": eps}


def check_holds(cache: PiKVCache, plain: PlainCache) -> None:
    """Raise AssertionError unless `retrieve` gives back, bit for bit, what the plain cache holds, and nothing else.

    A layer with a window may have dropped what no later query sees.
    """
    assert cache.sequences == plain.sequences
    for layer_id, rows in plain.rows.items():
        context, window = cache.retrieve(layer_id), plain.model.layers[layer_id].window
        for sequence, row in enumerate(rows):
            for head in range(plain.model.layers[layer_id].kv_heads):
                there = context.mask[sequence, head]
                held = context.positions[sequence, head, there].long()
                wanted = torch.isin(row.positions, held)
                needed = row.positions > (-1 if window is None else row.last + 1 - window)
                assert torch.equal(row.positions[wanted], held), f"layer {layer_id}, sequence {sequence}, head {head}"
                assert bool(wanted[needed].all()), f"layer {layer_id}, sequence {sequence}, head {head}"
                assert torch.equal(context.keys[sequence, head, there], row.keys[head, wanted])
                assert torch.equal(context.values[sequence, head, there], row.values[head, wanted])
