"""Commits: what a cache holds, into a streamer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from pikv.core import records
from pikv.core.components import composition
from pikv.core.config import ModelConfig
from pikv.core.errors import ConfigError
from pikv.core.forms import PageForm
from pikv.core.layer import LayerCache
from pikv.core.pool import PagePool
from pikv.core.ports import Manifest, Streamer, Ticket, Version
from pikv.core.runtime import RuntimeConfig
from pikv.core.states import taken_apart
from pikv.core.tables import ABSENT

BESIDE = "beside."  # begins the names of tensors that a cache's owner keeps with a version
AT_ONCE = 32 << 20  # bytes of records that are gathered for the store at a time


def commit(
    model: ModelConfig,
    runtime: RuntimeConfig,
    pool: PagePool,
    layers: Mapping[int, LayerCache],
    prefilling: bool,
    beside: Mapping[str, Tensor],
) -> Version:
    """See PiKVCache.commit."""
    streamer, tickets = streamer_of(runtime), list[Ticket]()
    try:
        # Not copied: the pages are held by the layers, and nothing is being written when this returns.
        tickets.extend(_appended(streamer, pool, _held(layers.values()), lambda pages: pages))
        manifest = _manifest(model, runtime, pool, layers, prefilling)
        more = {BESIDE + name: tensor for name, tensor in beside.items()}
        return streamer.commit(attrs.evolve(manifest, states={**manifest.states, **more}))
    finally:
        for ticket in tickets:
            with contextlib.suppress(OSError):  # the commit has said it
                ticket.wait()


def _manifest(
    model: ModelConfig, runtime: RuntimeConfig, pool: PagePool, layers: Mapping[int, LayerCache], prefilling: bool
) -> Manifest:
    facts: dict[str, Any] = {"components": composition(model, runtime), "prefilling": prefilling, "layers": {}}
    states: dict[str, Tensor] = {}
    pages: dict[int, list[Tensor]] = {}
    for layer_id, layer in layers.items():
        taken, tensors = taken_apart(layer, f"layers.{layer_id}")
        tensors[f"layers.{layer_id}.table.ids"] = _names(pool, layer)
        length = records.record_bytes(pool, layer.codec.form)
        facts["layers"][str(layer_id)] = {"record_bytes": length, "facts": taken}
        states |= tensors
        pages.setdefault(length, []).append(pool.names(layer.table.held().unique()))
    joined = {length: torch.cat(names) for length, names in pages.items()}
    return Manifest(facts=facts, states=states, pages=joined)


def beside(manifest: Manifest) -> dict[str, Tensor]:
    """What the cache's owner has kept with a version, by name."""
    states = manifest.states.items()
    return {name.removeprefix(BESIDE): tensor for name, tensor in states if name.startswith(BESIDE)}


def stream(runtime: RuntimeConfig, pool: PagePool, layers: Mapping[int, LayerCache]) -> None:
    """See PiKVCache.stream.

    Only pages without a name: what a streamer has lost since is for `commit`, whose search grows with the context.
    """
    with pool.locked():
        nameless = {form: ids[pool.names(ids) < 0] for form, ids in _held(layers.values()).items()}
        list(_appended(streamer_of(runtime), pool, nameless, Tensor.clone))


def streamer_of(runtime: RuntimeConfig) -> Streamer:
    """The runtime's streamer; ConfigError without one."""
    if runtime.streamer is None:
        raise ConfigError("commit and restore need a streamer in the runtime, such as ZarrStreamer(folder)")
    return runtime.streamer


def _held(layers: Iterable[LayerCache]) -> dict[PageForm, Tensor]:
    """The pages of each form, one entry for each time that a table has a page: int32 [n]."""
    held: dict[PageForm, list[Tensor]] = {}
    for layer in layers:
        held.setdefault(layer.codec.form, []).append(layer.table.held())
    return {form: torch.cat(parts) for form, parts in held.items()}


def _appended(
    streamer: Streamer, pool: PagePool, held: Mapping[PageForm, Tensor], made_last: Callable[[Tensor], Tensor]
) -> Iterator[Ticket]:
    """Append new pages, in the order of their slab rows: pages that were sealed together stay together.

    made_last: of records, until they are written: what lies in a slab lasts as long as its pages are held.
    """
    for form, ids in held.items():
        if not len(ids):
            continue
        ids = ids.unique()
        ids = ids[pool.rows(ids).argsort()]
        pool.name_new(ids)
        names = pool.names(ids)
        new = torch.nonzero(~streamer.holds(names)).flatten()
        for some in new.split(max(1, AT_ONCE // records.record_bytes(pool, form))):
            yield streamer.append(names[some], made_last(records.of_pages(pool, form, ids[some])))


def _names(pool: PagePool, layer: LayerCache) -> Tensor:
    """The page table by names instead of ids: int64 [sequences, kv_heads, width]."""
    ids = layer.table.ids[..., : layer.table.width]
    names = torch.full(ids.shape, ABSENT, dtype=torch.int64)
    names[ids != ABSENT] = pool.names(ids[ids != ABSENT])
    return names
