"""Restoring: a cache out of a version of a streamer, bit for bit, or an error that says what is lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from pikv.core import records
from pikv.core.basis import Basis
from pikv.core.checkpoint import AT_ONCE, streamer_of
from pikv.core.components import check_same, composition
from pikv.core.config import ModelConfig
from pikv.core.errors import DamagedError
from pikv.core.layer import LayerCache
from pikv.core.lost import lost_pages, lost_tokens
from pikv.core.pool import PagePool
from pikv.core.ports import Manifest, PageCodec, PageSelector, Streamer, Version
from pikv.core.reports import LostTokens
from pikv.core.runtime import RuntimeConfig
from pikv.core.serving import Served
from pikv.core.states import put_together
from pikv.core.tables import ABSENT


@attrs.frozen(kw_only=True)
class Source:
    """A version that was opened. reindex: makes the index of the pages anew; None takes it from the store.

    lost: takes the keys of pages that are missing or damaged, which are read as zeros; None makes them an error.
    """

    streamer: Streamer
    version: Version
    manifest: Manifest
    reindex: PageSelector | None
    lost: list[int] | None

    def read(self, names: Tensor, out: Tensor) -> None:
        """Fill out uint8 [n, record_bytes] with the records of pages int64 [n]."""
        try:
            self.streamer.read(self.version, names, out).wait()
        except DamagedError as error:
            if self.lost is None:
                raise
            self.lost.extend(error.keys)
            out[torch.isin(names, torch.tensor(error.keys, dtype=torch.int64))] = 0


def restore(
    model: ModelConfig,
    runtime: RuntimeConfig,
    pool: PagePool,
    served: list[Served],
    version: Version | None,
    may_differ: Iterable[str],
    lost: list[int] | None = None,
) -> tuple[dict[int, LayerCache], bool]:
    """The layers of a version, which hold their pages, and whether their prompt goes on; see PiKVCache.restore.

    lost: takes the keys of pages that are missing or damaged, which hold zeros then; they are an error without it.
    """
    streamer = streamer_of(runtime)
    chosen = streamer.newest() if version is None else version
    try:
        manifest = streamer.manifest(chosen)
        reindex = _checked(model, runtime, manifest, may_differ)
        source = Source(streamer=streamer, version=chosen or Version(0), manifest=manifest, reindex=reindex, lost=lost)
        return _layers(source, pool, served), manifest.facts["prefilling"]
    except DamagedError as error:
        raise _told(error, streamer, chosen) from error


def _checked(
    model: ModelConfig, runtime: RuntimeConfig, manifest: Manifest, may_differ: Iterable[str]
) -> PageSelector | None:
    """Raise ConfigError unless the composition is the version's; what indexes its pages anew, if that must be."""
    stored, now = manifest.facts["components"], composition(model, runtime)
    check_same(stored, now, may_differ)
    return runtime.page_selector if stored["page_selector"] != now["page_selector"] else None


def _layers(source: Source, pool: PagePool, served: list[Served]) -> dict[int, LayerCache]:
    layers: dict[int, LayerCache] = {}
    try:
        for number, facts in source.manifest.facts["layers"].items():
            layers[int(number)] = _layer(source, int(number), facts, pool, served[int(number)].codec)
    except BaseException:
        for layer in layers.values():
            layer.release()
        raise
    return layers


def _layer(source: Source, layer_id: int, facts: Mapping[str, Any], pool: PagePool, codec: PageCodec) -> LayerCache:
    states, name = source.manifest.states, f"layers.{layer_id}"
    layer = LayerCache(
        layer_id=layer_id,
        codec=codec,
        pool=pool,
        **put_together(LayerCache, facts["facts"], states, name, pool.device),
    )
    names = layer.table.ids  # as the store has them; they become ids of this pool
    held = names[names != ABSENT].unique()
    ids, basis = torch.empty(0, dtype=torch.int32), None if layer.basis is None else _of_pages(layer.basis, names, held)
    try:
        for some in held.split(max(1, AT_ONCE // facts["record_bytes"])):
            block = slice(len(ids), len(ids) + len(some))
            ids = torch.cat([ids, pool.allocate(codec.form, len(some))])
            turned = None if basis is None else basis[block]
            _read_pages(source, pool, codec, ids[block], some, facts["record_bytes"], turned)
        if pool.residency is not None:
            pool.residency.belong(ids, layer_id)
        pool.name(ids, held)
        numbers = torch.searchsorted(held, names.clamp(min=0)).clamp(max=max(0, len(held) - 1))
        layer.table.ids = (ids[numbers] if len(held) else names.int()).masked_fill(names == ABSENT, ABSENT)
        pool.retain(layer.table.held())
    finally:
        pool.release(codec.form, ids)
    return layer


def _of_pages(basis: Basis, names: Tensor, held: Tensor) -> Basis:
    """The basis of each of the held pages; a page that several sequences share was written in the same for all."""
    sequence, head, page = torch.nonzero(names != ABSENT, as_tuple=True)
    number = torch.searchsorted(held, names[sequence, head, page])
    owner = torch.empty(2, len(held), dtype=torch.int64)
    owner[:, number] = torch.stack([sequence, head])
    return basis.of_pages(*owner)


def _read_pages(
    source: Source,
    pool: PagePool,
    codec: PageCodec,
    ids: Tensor,
    names: Tensor,
    record_bytes: int,
    basis: Basis | None,
) -> None:
    with pool.locked():  # so that they stay near
        out = records.target(pool, codec.form, ids, record_bytes)
        source.read(names, out)
        records.put(pool, codec, ids, out, source.reindex, basis)


def _told(error: DamagedError, streamer: Streamer, version: Version | None) -> DamagedError:
    """The error with all that is lost, and what can be restored instead."""
    lost = () if version is None else _lost(streamer, version)
    good = streamer.newest_good()
    tokens = "".join(f"; {each}" for each in lost[:8]) + ("; ..." if len(lost) > 8 else "")
    instead = "no version is undamaged" if good is None else f"restore version={good!r}, the newest undamaged one"
    return DamagedError(f"{error}{tokens}; {instead}", error.keys, lost=lost, newest_good=good)


def _lost(streamer: Streamer, version: Version) -> tuple[LostTokens, ...]:
    """The tokens whose pages are missing or damaged; none where the manifest itself is."""
    try:
        manifest = streamer.manifest(version)
    except DamagedError:
        return ()
    damaged: list[int] = []
    for record_bytes, names in manifest.pages.items():
        for some in names.split(max(1, AT_ONCE // record_bytes)):
            try:
                streamer.read(version, some, torch.empty(len(some), record_bytes, dtype=torch.uint8)).wait()
            except DamagedError as error:
                damaged += error.keys
    return lost_tokens(lost_pages(manifest, damaged))
