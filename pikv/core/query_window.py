"""The newest queries of each sequence, for token selectors that look at what is asked."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor


@attrs.frozen
class QueryWindow:
    """The queries that a token selector looks at.

    queries: [sequences, query_heads, window, key_dim], oldest first; positions: int64 [sequences, window], -1 where a
    sequence has asked fewer.
    """

    queries: Tensor
    positions: Tensor

    @classmethod
    def empty(cls, queries: Tensor, window: int) -> QueryWindow:
        """A window without queries, for queries such as [sequences, query_heads, tokens, key_dim]."""
        sequences, query_heads, _, key_dim = queries.shape
        return cls(queries.new_zeros(sequences, query_heads, window, key_dim), torch.full((sequences, window), -1))

    @property
    def nbytes(self) -> int:
        """The bytes of the window's storages."""
        return self.queries.untyped_storage().nbytes() + self.positions.untyped_storage().nbytes()

    def followed_by(self, queries: Tensor, positions: Tensor) -> QueryWindow:
        """The window after queries [sequences, query_heads, tokens, key_dim] at positions [sequences, tokens].

        A position below 0 is padding, and its query is left out.
        """
        positions = positions.clamp(min=-1)
        window = self.positions.shape[1]
        if bool((positions >= 0).all()):  # then the newest are the last, and a long prompt need not be copied
            queries, positions = queries[:, :, -window:], positions[:, -window:]
        asked = torch.cat([self.positions, positions], dim=1)
        states = torch.cat([self.queries, queries], dim=2)
        newest = (asked >= 0).int().sort(dim=1, stable=True).indices[:, -window:]
        there = newest.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return QueryWindow(states.gather(2, there), asked.gather(1, newest))

    def select(self, index: Tensor) -> QueryWindow:
        """The windows of the sequences at index int64 [n]."""
        return QueryWindow(self.queries[index.to(self.queries.device)], self.positions[index])

    @classmethod
    def completed(cls, windows: list[QueryWindow | None], sequences: list[int]) -> list[QueryWindow]:
        """The windows of several batches, empty ones where a batch has asked nothing; none if no batch has."""
        like = next((window for window in windows if window is not None), None)
        if like is None:
            return []
        return [
            cls.empty(like.queries[:1].expand(count, -1, -1, -1), like.positions.shape[1]) if window is None else window
            for window, count in zip(windows, sequences, strict=True)
        ]

    def cropped(self, end: Tensor) -> QueryWindow:
        """The window without the queries at a position >= end, int64 [sequences]."""
        return QueryWindow(self.queries, self.positions.masked_fill(self.positions >= end[:, None], -1))

    @classmethod
    def joined(cls, windows: list[QueryWindow]) -> QueryWindow:
        """The windows of several batches, one after another."""
        queries = torch.cat([window.queries for window in windows])
        return cls(queries, torch.cat([window.positions for window in windows]))
