"""What token selectors remember of the attention that each stored token has got."""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = torch.iinfo(torch.int32).max  # past a row's last token, so that positions never fall along a row


@attrs.frozen
class Attended:
    """A weight for each token that was stored when attention was last folded into it.

    positions: int32 [sequences, kv_heads, tokens], growing along a row, ABSENT past its last token; weights: float32 of
    the same shape.
    """

    positions: Tensor
    weights: Tensor

    @classmethod
    def of(cls, positions: Tensor, weights: Tensor) -> Attended:
        """Of a view's tokens: positions [sequences, kv_heads, tokens], below 0 past a row's last one."""
        return cls(positions.masked_fill(positions < 0, ABSENT).int(), weights.float())

    @classmethod
    def none(cls, like: Tensor) -> Attended:
        """Nothing remembered of rows like positions [sequences, kv_heads, tokens]."""
        nothing = like[..., :0].int()
        return cls(nothing, nothing.float())

    @property
    def nbytes(self) -> int:
        """The bytes of the storages."""
        return self.positions.untyped_storage().nbytes() + self.weights.untyped_storage().nbytes()

    def at(self, positions: Tensor) -> Tensor:
        """The weights of tokens at positions [sequences, kv_heads, tokens]: 0 where nothing is remembered."""
        if not self.positions.shape[-1]:
            return torch.zeros(positions.shape, device=positions.device)
        wanted = positions.int().contiguous()
        place = torch.searchsorted(self.positions, wanted).clamp(max=self.positions.shape[-1] - 1)
        found = self.positions.gather(-1, place) == wanted
        return self.weights.gather(-1, place) * found

    def select(self, index: Tensor) -> Attended:
        """Of the sequences at index int64 [n]."""
        there = index.to(self.positions.device)
        return Attended(self.positions[there], self.weights[there])

    def cropped(self, end: Tensor) -> Attended:
        """Without the tokens at a position >= end, int64 [sequences]."""
        beyond = self.positions >= end.to(self.positions.device)[:, None, None]
        return Attended(self.positions.masked_fill(beyond, ABSENT), self.weights)

    @classmethod
    def completed(cls, parts: list[Attended | None], like: list[Tensor]) -> list[Attended]:
        """Parts with none for None, of rows like positions [sequences, kv_heads, ..]; no parts if all are None."""
        if all(part is None for part in parts):
            return []
        return [cls.none(rows) if part is None else part for part, rows in zip(parts, like, strict=True)]

    @classmethod
    def joined(cls, parts: list[Attended]) -> Attended | None:
        """Of several batches, one after another; None of no parts."""
        if not parts:
            return None
        width = max(part.positions.shape[-1] for part in parts)
        room = [(0, width - part.positions.shape[-1]) for part in parts]
        return cls(
            torch.cat([F.pad(part.positions, pad, value=ABSENT) for part, pad in zip(parts, room, strict=True)]),
            torch.cat([F.pad(part.weights, pad) for part, pad in zip(parts, room, strict=True)]),
        )
