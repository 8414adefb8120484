"""Promised: pages of prompts that another process is writing, awaited layer by layer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import attrs

from pikv.core import layers
from pikv.core.errors import WaitTimeoutError
from pikv.core.layer import LayerCache
from pikv.core.lineage import KnownTokens
from pikv.core.stored_pages import StoredPages, name_of

POLL_S = 0.002  # between two looks at a store that has nothing new


@attrs.frozen(kw_only=True, eq=False)
class Promised:
    """What `begin` promised of prompts. wait_s: for how long a layer waits. It holds no pages, the pool's index does.

    While a layer waits, what has come of later layers is read, so that a prompt that comes in parts is here when its
    last part is.
    """

    stored: StoredPages
    sequences: Sequence[KnownTokens]
    wait_s: float

    def layer(self, layer_id: int) -> LayerCache:
        """The layer with all its pages, which it holds. Raises WaitTimeoutError, StoreError, PoolFullError."""
        pool, until, over = self.stored.pool, time.monotonic() + self.wait_s, False
        while True:
            with pool.locked():
                here = [pool.prefixes.known(each.keys, [layer_id]) for each in self.sequences]
                if all(count == len(each.keys) for count, each in zip(here, self.sequences, strict=True)):
                    return layers.adopted(layer_id, self.stored.codecs[layer_id], pool, self.sequences)
            if over:
                raise self._late(layer_id, here)
            over = time.monotonic() >= until  # what comes now is looked at once more
            if not self._read(layer_id):
                time.sleep(POLL_S)  # a store tells nobody that something has come

    def _read(self, layer_id: int) -> bool:
        """Read what has come of this layer, or else of the first later one that has got any; whether anything has."""
        prefixes = self.stored.pool.prefixes
        missing = [
            (each.keys, start, layer)
            for layer in range(layer_id, len(self.stored.codecs))
            for each in self.sequences
            for start in [prefixes.known(each.keys, [layer])]
            if start < len(each.keys)
        ]
        there = self.stored.store.contains([name_of(keys[start], layer) for keys, start, layer in missing])
        come = [part for part, is_there in zip(missing, there.tolist(), strict=True) if is_there]
        reached = [self.stored.read_on(*part) > part[1] for part in come if part[2] == come[0][2]]
        return any(reached)

    def _late(self, layer_id: int, here: Sequence[int]) -> WaitTimeoutError:
        """The error that names the first page that is missing."""
        counts = zip(here, self.sequences, strict=True)
        sequence, page = next((i, count) for i, (count, each) in enumerate(counts) if count < len(each.keys))
        first, total = page * self.sequences[sequence].page_size, len(self.sequences[sequence].keys)
        return WaitTimeoutError(
            f"prefixes: page {page} of {total} of layer {layer_id}, sequence {sequence} (tokens {first} to "
            f"{first + self.sequences[sequence].page_size - 1}), has not come within {self.wait_s} s; call again to "
            "wait on, or reset the cache and begin without wait_s, which adopts what is there, and compute the rest"
        )
