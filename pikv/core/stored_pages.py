"""StoredPages: the pages of prompts on their way between a pool and the store that it shares with other processes.

What the store holds under a name is a page of all KV heads of one layer, records one after another.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from pikv.core import records
from pikv.core.errors import PoolFullError, StateError, StoreError
from pikv.core.fetching import flops_of
from pikv.core.pool import PagePool
from pikv.core.ports.backend import PageCodec
from pikv.core.ports.fetching import Fetching
from pikv.core.ports.prefix_store import PrefixStore

AT_ONCE = 32 << 20  # bytes that are read before they are put into the pool
FIRST = 4  # pages that are asked for at first where it is not known how many are there

_log = logging.getLogger(__name__)


def name_of(key: bytes, layer_id: int) -> str:
    """The name in a store of the page with this key in a layer."""
    return f"{key.hex()}.{layer_id}"


@attrs.frozen(kw_only=True, eq=False)
class StoredPages:
    """The pages of a pool in a store. codecs: of the layers. It waits for the store without holding the pool's lock."""

    store: PrefixStore
    fetching: Fetching
    pool: PagePool
    codecs: Sequence[PageCodec]

    def page_bytes(self, layer_id: int) -> int:
        """The bytes that the store holds of a page in a layer."""
        codec = self.codecs[layer_id]
        return codec.layer.kv_heads * records.record_bytes(self.pool, codec.form)

    def write(self, keys: Sequence[bytes], layer_id: int, ids: Tensor) -> None:
        """Let the store write pages int32 [keys, kv_heads] of a layer. What it cannot take is logged: it can wait."""
        found = records.of_pages(self.pool, self.codecs[layer_id].form, ids.flatten())
        pages = found.reshape(len(keys), self.page_bytes(layer_id)).clone()  # rows may be others' before it has written
        try:
            self.store.write([name_of(key, layer_id) for key in keys], pages)
        except (StoreError, StateError) as error:
            _log.warning("prefixes: %d pages of layer %d are not shared (%s)", len(keys), layer_id, error)

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of these keys, from the first on, the store has in the last layer. A gap is found by reading."""
        last = len(self.codecs) - 1

        def missing(page: int) -> bool:
            return not bool(self.store.contains([name_of(keys[page], last)]))

        return bisect.bisect_left(range(len(keys)), True, key=missing)

    def fetch(self, keys: Sequence[bytes]) -> None:
        """Put into the pool what it lacks of these keys, from the first on, as far as the store has all layers.

        Nothing where computing their tokens is faster. What is missing, or does not fit, ends it; so does a store that
        fails, which is logged.
        """
        known = self.pool.prefixes.known(keys, range(len(self.codecs)))
        try:
            stop = known + self.count(keys[known:])
            if stop > known and not self._accepts(known, stop):
                return
            for layer_id in range(len(self.codecs)):
                stop = self._fetch_layer(keys[:stop], known, layer_id)
        except StoreError as error:
            _log.warning("prefixes: %s; what is not in memory is computed", error)
        except PoolFullError as error:
            _log.info("prefixes: stored pages do not fit beside what is in use (%s); they are computed", error)

    def _accepts(self, known: int, stop: int) -> bool:
        """Whether the pages from one key to another are worth fetching, all layers; the log says why."""
        rates, layers = self.pool.prefixes.rates, range(len(self.codecs))
        page_size, pages = self.codecs[0].form.page_size, stop - known
        nbytes = pages * sum(self.page_bytes(layer_id) for layer_id in layers)
        flops = sum(flops_of(codec.layer, known * page_size, pages * page_size) for codec in self.codecs)
        accepted, why = self.fetching.accepts(rates.offer(nbytes, flops))
        rates.refused = 0 if accepted else rates.refused + 1
        done = "fetched" if accepted else "computed"
        _log.info("prefixes: %d tokens that are stored are %s: %s", pages * page_size, done, why)
        return accepted

    def _fetch_layer(self, keys: Sequence[bytes], known: int, layer_id: int) -> int:
        """The pages keys[known:] of a layer, until one is missing; returns how many keys there are until then."""
        at_once = max(1, AT_ONCE // self.page_bytes(layer_id))
        for start in range(known, len(keys), at_once):
            some = keys[start : start + at_once]
            pages = torch.empty(len(some), self.page_bytes(layer_id), dtype=torch.uint8)
            began = time.perf_counter()
            there = self.store.read([name_of(key, layer_id) for key in some], pages)
            count = int(there.long().cumprod(0).sum())
            if count:
                self.pool.prefixes.rates.fetched(pages[:count].nbytes, time.perf_counter() - began)
            self.put(keys[: start + count], layer_id, pages[:count])
            if count < len(some):
                return start + count
        return len(keys)

    def read_on(self, keys: Sequence[bytes], start: int, layer_id: int) -> int:
        """Put into the pool the pages keys[start:] of a layer, until one is not there; returns how many keys there are.

        Each time twice as many are asked for. Raises StoreError, PoolFullError.
        """
        at_once = FIRST
        while start < len(keys):
            stop = min(start + at_once, len(keys))
            reached = self._fetch_layer(keys[:stop], start, layer_id)
            if reached < stop:
                return reached
            start, at_once = stop, 2 * at_once
        return len(keys)

    def put(self, keys: Sequence[bytes], layer_id: int, pages: Tensor) -> None:
        """Make pages uint8 [n, page_bytes] of a layer, which the last n keys are of, known in the pool.

        Raises PoolFullError.
        """
        codec, kv_heads = self.codecs[layer_id], self.codecs[layer_id].layer.kv_heads
        with self.pool.locked():
            ids = self.pool.allocate(codec.form, len(pages) * kv_heads)
            try:
                if self.pool.residency is not None:
                    self.pool.residency.belong(ids, layer_id)
                records.put(self.pool, codec, ids, pages.view(len(ids), pages.shape[1] // kv_heads), None)
                self.pool.prefixes.add(keys, layer_id, codec.form, ids.view(len(pages), kv_heads))
            finally:
                self.pool.release(codec.form, ids)
