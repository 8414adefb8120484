"""A damaged version made whole: what is missing is read again by the model."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor, nn

from pikv.adapters.transformers.cache import HostCache
from pikv.adapters.transformers.padding import Seen
from pikv.core.cache import PiKVCache
from pikv.core.errors import StateError
from pikv.core.reports import LostTokens
from pikv.core.salvage import Salvage


@attrs.frozen(kw_only=True, eq=False)
class Recovered:
    """A cache that is whole. lost: the tokens whose keys and values were missing or damaged in some layer.

    read_tokens: how many the model has read again, over all sequences. why_whole: why it had to read all of them; None
    where what was lost, and a token more for each piece of it, was enough.
    """

    cache: HostCache
    lost: tuple[LostTokens, ...]
    read_tokens: int
    why_whole: str | None


@attrs.frozen(kw_only=True, eq=False)
class Reader:
    """Reads tokens that were read before. wrapped: makes a host's cache; chunk_tokens: how many are read at a time."""

    model: nn.Module
    wrapped: Callable[[PiKVCache, Seen], HostCache]
    chunk_tokens: int

    def recovered(self, salvage: Salvage, seen: Seen, empty: Callable[[], PiKVCache]) -> Recovered:
        """Fill the gaps of a salvage, or read everything into an empty cache where that will not do."""
        read = 0
        if salvage.why_whole is None:
            while (gap := salvage.gap) is not None:
                row, part = seen.select(torch.tensor([gap.sequence])), salvage.before(gap)
                read += self._read(self.wrapped(part, row.cropped(gap.first)), row, gap.first, gap.stop)
                salvage.fill(gap, part)
            cache = self.wrapped(salvage.cache, seen)
        else:
            cache = self.wrapped(empty(), Seen.nothing())
            read = self._read(cache, seen, 0, seen.length)
        return Recovered(cache=cache, lost=salvage.lost, read_tokens=read, why_whole=salvage.why_whole)

    def _read(self, cache: HostCache, seen: Seen, first: int, stop: int) -> int:
        """Let the model read tokens from first up to stop, in chunks; how many they are, over all sequences."""
        text = seen.text
        if text is None:
            raise StateError(
                "what was lost cannot be read again: some of the tokens came as inputs_embeds, so it is not known what "
                "they were; restore an undamaged version, which DamagedError.newest_good of host.restore names"
            )
        for start in range(first, stop, self.chunk_tokens):
            end = min(start + self.chunk_tokens, stop)
            part = text.part(start, end)
            mask = None if seen.mask is None else seen.mask[:, :end].long().to(self._device)
            with torch.no_grad():
                self.model(
                    input_ids=self._here(part.ids),
                    position_ids=self._here(part.places),
                    attention_mask=mask,
                    past_key_values=cache,
                )
        return (stop - first) * len(text.ids)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _here(self, numbers: Tensor) -> Tensor:
        return numbers.to(self._device, torch.int64)
