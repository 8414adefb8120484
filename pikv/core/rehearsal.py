"""The second pass over a prompt, for token selectors that judge by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import attrs
import torch
from torch import Tensor

from pikv.core.errors import StateError
from pikv.core.layer import LayerCache
from pikv.core.ports.selector import AttendedTokenSelector, SecondPassSelector


@attrs.define(kw_only=True, eq=False)
class Rehearsal:
    """Whether a cache is in a second pass, and whose memory attention goes to."""

    selector: AttendedTokenSelector | None
    layers: Mapping[int, LayerCache]
    running: bool = False

    def remembers(self, *, prefilling: bool) -> AttendedTokenSelector | None:
        """Who folds the attention of now into what it remembers: for a second pass, not that of the first."""
        first_pass = prefilling and not self.running
        return None if first_pass and isinstance(self.selector, SecondPassSelector) else self.selector

    @contextlib.contextmanager
    def run(self, crop: Callable[[Tensor], None], *, prefilling: bool) -> Iterator[None]:
        """See PiKVCache.rehearsal. crop: forgets what is past positions [sequences]."""
        if not isinstance(self.selector, SecondPassSelector):
            raise StateError("rehearsal needs a token selector that judges by a second pass; the nearest is KVzip()")
        if not prefilling or not self.layers:
            raise StateError("rehearsal comes after a prompt and before finish_prefill or the first decoded token")
        ends = torch.stack([layer.last for layer in self.layers.values()]).amax(0) + 1
        self.running = True
        try:
            yield
        finally:
            self.running = False
            crop(ends)
