"""The exact tail of each row: its newest tokens, dense, in the model's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core.slab import empty

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig

EMPTY = -1
ROOM = 64  # slots that a tail grows by
SLOTS_AT_ONCE = 512  # moved at a time, so that moving needs little memory for itself


@attrs.define
class Tail:
    """The unsealed tokens of each row, oldest first, from slot 0.

    keys [sequences, kv_heads, capacity, key_dim], own_values [..., value_dim], positions int32 [sequences, kv_heads,
    capacity], EMPTY past a row's length; all contiguous. own_values: None where the first value_dim channels of keys
    are the values. lengths: int64 [sequences, kv_heads], on the CPU. width: the length of the longest row; even:
    whether all rows have it, so that no slot has to be masked. Both follow from lengths and are kept, since a decode
    step asks for them often.
    """

    keys: Tensor
    own_values: Tensor | None
    positions: Tensor
    lengths: Tensor
    value_dim: int
    width: int = attrs.field(init=False)
    even: bool = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._set_lengths(self.lengths)

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths
        shortest, longest = (int(bound) for bound in lengths.aminmax()) if lengths.numel() else (0, 0)
        self.width, self.even = longest, shortest == longest

    @classmethod
    def empty(cls, layer: LayerConfig, keys: Tensor) -> Tail:
        """A tail without room or tokens for a layer's tokens such as keys [sequences, kv_heads, tokens, key_dim]."""
        sequences, kv_heads = keys.shape[:2]
        stored = layer.values == "stored"
        return cls(
            keys.new_empty(sequences, kv_heads, 0, layer.key_dim),
            keys.new_empty(sequences, kv_heads, 0, layer.value_dim) if stored else None,
            keys.new_full((sequences, kv_heads, 0), EMPTY, dtype=torch.int32),
            torch.zeros(sequences, kv_heads, dtype=torch.int64),
            layer.value_dim,
        )

    @property
    def values(self) -> Tensor:
        """[sequences, kv_heads, capacity, value_dim]; a view of the keys where they hold the values."""
        return self.keys[..., : self.value_dim] if self.own_values is None else self.own_values

    @property
    def _states(self) -> tuple[Tensor, ...]:
        return (self.keys,) if self.own_values is None else (self.keys, self.own_values)

    @property
    def nbytes(self) -> int:
        """The bytes of the tail's storages."""
        tensors = (*self._states, self.positions, self.lengths)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add tokens: keys [sequences, kv_heads, tokens, key_dim], values, positions int64 [sequences, tokens].

        A token whose position is negative is padding and is left out. Values that are a prefix of the keys are too.
        """
        stored = positions >= 0
        lengths = self.lengths + stored.sum(-1)[:, None]
        self.reserve(int(lengths.max()))
        self._scatter(keys, values, positions, stored)
        self._set_lengths(lengths)

    def append_all(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """The same for tokens of which none is padding."""
        if not self.even:
            self.append(keys, values, positions)
            return
        start, count = self.width, keys.shape[2]
        self.reserve(start + count)
        self.keys.narrow(2, start, count).copy_(keys)
        if self.own_values is not None:
            self.own_values.narrow(2, start, count).copy_(values)
        self.positions.narrow(2, start, count).copy_(positions[:, None])
        self.lengths, self.width = self.lengths + count, start + count

    def _scatter(self, keys: Tensor, values: Tensor, positions: Tensor, stored: Tensor) -> None:
        sequence, token = torch.nonzero(stored, as_tuple=True)
        rank = (stored.cumsum(-1) - 1)[sequence, token]  # which of its sequence's stored tokens each one is
        slot = (self.lengths[sequence] + rank[:, None]).to(keys.device)  # [n, kv_heads]
        sequence, token = sequence.to(keys.device)[:, None], token.to(keys.device)[:, None]
        head = torch.arange(keys.shape[1], device=keys.device)
        self.keys[sequence, head, slot] = keys[sequence, head, token]
        if self.own_values is not None:
            self.own_values[sequence, head, slot] = values[sequence, head, token]
        places = positions.to(self.positions)
        self.positions[sequence, head, slot] = places[sequence, token].expand(-1, len(head))

    def keep(self, kept: Tensor) -> None:
        """Keep the tokens marked in kept, bool [sequences, kv_heads, width] on the tail's device, in their order."""
        width = kept.shape[-1]
        kept = kept & (self.positions[..., :width] != EMPTY)
        self._set_lengths(kept.sum(-1).cpu())
        order = kept.logical_not().int().sort(dim=-1, stable=True).indices[..., : self.width]
        sequences, kv_heads, room = self.positions.shape
        first_slots = room * torch.arange(sequences * kv_heads, device=order.device).view(sequences, kv_heads, 1)
        for start in range(0, self.width, SLOTS_AT_ONCE):  # in place: a token never moves back, so none is overwritten
            source = (order + first_slots)[..., start : start + SLOTS_AT_ONCE]
            for tensor in self._states:  # whole tokens at once, which is several times faster than number by number
                moved = tensor.flatten(0, 2).index_select(0, source.flatten())
                tensor[:, :, start : start + source.shape[2]] = moved.view(*source.shape, -1)
        self._settle_positions(self.positions.gather(2, order), width)

    def drop_oldest(self, tokens: int) -> None:
        """Drop the same number of tokens from the front of every row; all rows have as many."""
        width = self.width
        for tensor in self._states:
            tensor[:, :, : width - tokens] = tensor[:, :, tokens:width].clone()
        self._set_lengths(self.lengths - tokens)
        self._settle_positions(self.positions[..., tokens:width].clone(), width)

    def _settle_positions(self, positions: Tensor, old_width: int) -> None:
        self.positions[..., : self.width] = positions
        beyond = torch.arange(old_width) >= self.lengths[..., None]
        self.positions[..., :old_width].masked_fill_(beyond.to(self.positions.device), EMPTY)

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens, and some more: a decoded token rarely needs new room."""
        if tokens > self.positions.shape[2]:
            self._resize(-(-tokens // ROOM) * ROOM)

    def shrink(self, tokens: int) -> None:
        """Give room back down to `tokens` a row, or to the longest row."""
        tokens = max(tokens, self.width)
        if tokens < self.positions.shape[2]:
            self._resize(tokens)

    def _resize(self, capacity: int) -> None:
        """Positions come last, so that a resize which found no memory half way is done again by the next one."""
        width = self.width
        for name, fill in _FILLS.items():
            old: Tensor | None = getattr(self, name)
            if old is None:
                continue
            new = empty((*old.shape[:2], capacity, *old.shape[3:]), like=old)
            new[:, :, :width] = old[:, :, :width]
            new[:, :, width:] = fill
            setattr(self, name, new)

    def select(self, index: Tensor) -> Tail:
        """A tail of the sequences at index [n]; a sequence may come several times, or not at all."""
        there = index.to(self.keys.device)
        own_values = None if self.own_values is None else self.own_values[there]
        return Tail(self.keys[there], own_values, self.positions[there], self.lengths[index], self.value_dim)

    @classmethod
    def joined(cls, tails: list[Tail]) -> Tail:
        """One tail of the sequences of several."""
        lengths = torch.cat([tail.lengths for tail in tails])
        first_tail = tails[0]
        own_values = None if first_tail.own_values is None else first_tail.own_values[:0]
        joined = cls(first_tail.keys[:0], own_values, first_tail.positions[:0], lengths, first_tail.value_dim)
        capacity = -(-joined.width // ROOM) * ROOM
        for name, fill in _FILLS.items():
            parts: list[Tensor] = [states for tail in tails if (states := getattr(tail, name)) is not None]
            if not parts:
                continue
            new = empty((len(lengths), parts[0].shape[1], capacity, *parts[0].shape[3:]), like=parts[0])
            first = 0
            for part in parts:
                width = min(part.shape[2], joined.width)
                new[first : first + len(part), :, :width] = part[:, :, :width]
                new[first : first + len(part), :, width:] = fill
                first += len(part)
            setattr(joined, name, new)
        return joined


_FILLS = {"keys": 0, "own_values": 0, "positions": EMPTY}  # what stands past a row's length
