"""Whether stored pages are worth fetching: an inner port."""

from __future__ import annotations

import abc

import attrs


@attrs.frozen(kw_only=True)
class Offer:
    """Pages that a store has of a prompt. nbytes: to fetch. flops: to compute their tokens instead.

    bytes_a_second, flops_a_second: as measured, medians of the last few times; None before any. refused: how many
    offers in a row were.
    """

    nbytes: int
    flops: float
    bytes_a_second: float | None
    flops_a_second: float | None
    refused: int


class Fetching(abc.ABC):
    """Decide about an offer. Settings only."""

    @abc.abstractmethod
    def accepts(self, offer: Offer) -> tuple[bool, str]:
        """Whether the pages are fetched, and why, for the log."""
