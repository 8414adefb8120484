"""The composer: the one module that knows adapters and policies by name, and wires them into a cache."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from pikv.adapters.compressors import Fp8, Int2, Int4, Int8, LowRank, Rotated, UnrotatedLowRank, load_axes
from pikv.core.cache import PiKVCache
from pikv.core.config import ModelConfig
from pikv.core.errors import ConfigError, UnknownNameError
from pikv.core.exact import Exact, KeepAll, LeastRecentlyRead, Refuse
from pikv.core.fetching import FetchAlways, FetchIfFaster
from pikv.core.missing_backend import MissingBackend
from pikv.core.overlap import Overlap
from pikv.core.pool import PagePool
from pikv.core.ports import (
    Allocator,
    Backend,
    Compressor,
    Demotion,
    Fetching,
    FullPool,
    MemoryTier,
    PagePredictor,
    PageSelector,
    PrefixStore,
    Router,
    ScoreAllocator,
    Sharding,
    Streamer,
    TokenSelector,
    Transport,
)
from pikv.core.runtime import RuntimeConfig
from pikv.core.torch_backend import TorchBackend
from pikv.policies import (
    AdaKV,
    CacheAware,
    Capacity,
    ChunkKV,
    DuoAttention,
    EvictOldest,
    ExpectedAttention,
    ExpertGroups,
    GroupLimited,
    HeavyHitters,
    Importance,
    KeyCodes,
    KeyDiff,
    KeyNorm,
    KvHeads,
    KVzip,
    LagKV,
    LatencyAware,
    LoadBalance,
    Planned,
    Pyramid,
    Quest,
    Recent,
    SnapKV,
    TokenRange,
    TopK,
    Tova,
    Uniform,
)

_CPU = torch.device("cpu")


def _zarr(folder: str, *, keep_versions: int | None = None) -> Streamer:
    from pikv.adapters.zarr_store import ZarrStreamer  # here, so that `import pikv` does not import obstore

    return ZarrStreamer(folder, keep_versions=keep_versions)


def _stored_prefixes(folder: str) -> PrefixStore:
    from pikv.adapters.zarr_store import StoredPrefixes  # here, so that `import pikv` does not import obstore

    return StoredPrefixes(folder)


def _rotated(inner: Compressor) -> Callable[[], Compressor]:
    return lambda: Rotated(inner)


def _low_rank(part: type[LowRank] | type[UnrotatedLowRank]) -> Callable[..., Compressor | tuple[Compressor, ...]]:
    def made(
        *, rank: int, inner: Compressor | None = None, outliers: int = 0, axes: str | None = None
    ) -> Compressor | tuple[Compressor, ...]:
        """axes: a file made by `save_axes`, which has one for each layer."""
        rounding = Exact() if inner is None else inner
        if axes is None:
            return part(rank=rank, inner=rounding, outliers=outliers)
        return tuple(part(rank=rank, inner=rounding, outliers=outliers, axes=each) for each in load_axes(axes))

    return made


PARTS: dict[str, dict[str, Callable[..., Any]]] = {
    "allocator": {
        "adakv": AdaKV,
        "duo_attention": DuoAttention,
        "planned": Planned,
        "pyramid": Pyramid,
        "uniform": Uniform,
    },
    "compressor": {
        "exact": Exact,
        "fp8": Fp8,
        "int2": Int2,
        "int2_rotated": _rotated(Int2()),
        "int4": Int4,
        "int4_rotated": _rotated(Int4()),
        "int8": Int8,
        "int8_rotated": _rotated(Int8()),
        "low_rank": _low_rank(LowRank),
        "low_rank_unrotated": _low_rank(UnrotatedLowRank),
    },
    "fetching": {"always": FetchAlways, "if_faster": FetchIfFaster},
    "prefix_store": {"stored": _stored_prefixes},
    "router": {
        "cache_aware": CacheAware,
        "capacity": Capacity,
        "group_limited": GroupLimited,
        "latency_aware": LatencyAware,
        "load_balance": LoadBalance,
        "top_k": TopK,
    },
    "shard_by": {"experts": ExpertGroups, "kv_heads": KvHeads, "token_range": TokenRange},
    "streamer": {"zarr": _zarr},
    "page_selector": {"key_codes": KeyCodes, "quest": Quest},
    "token_selector": {
        "chunkkv": ChunkKV,
        "expected_attention": ExpectedAttention,
        "h2o": HeavyHitters,
        "importance": Importance,
        "keep_all": KeepAll,
        "keydiff": KeyDiff,
        "key_norm": KeyNorm,
        "kvzip": KVzip,
        "lagkv": LagKV,
        "recent": Recent,
        "snapkv": SnapKV,
        "streaming_llm": Recent,  # the paper's name
        "tova": Tova,
    },
    "when_full": {"evict_oldest": EvictOldest, "refuse": Refuse},
}
_PARTS_OF_PARTS = {
    "inner": "compressor",
    "across": "allocator",
    "scored_by": "token_selector",
}  # settings that are parts, and their kind
NUMBERS = ("budget_tokens", "page_size", "tail_tokens")


def installed_backends(device: torch.device = _CPU) -> tuple[Backend, ...]:
    """The backends that this installation has for a device, the fastest first; torch, which serves everything, last.

    On a GPU without CuPy torch stands alone, beside a `MissingBackend` by which `describe()` says what is lacking.
    """
    if device.type == "cuda":
        return (_cupy(), TorchBackend())
    if importlib.util.find_spec("numba") is None:
        return (TorchBackend(),)
    from pikv.adapters.numba_cpu import NumbaCpu  # here, so that `import pikv` does not import numba

    return (NumbaCpu(), TorchBackend())


def _cupy() -> Backend:
    if importlib.util.find_spec("cupy") is None:
        remedy = "install pikv[cuda12] or pikv[cuda13], whichever the driver fits, for kernels that read encoded pages"
        return MissingBackend(missing="cupy_gpu", remedy=remedy)
    from pikv.adapters.cupy_gpu import CupyGpu  # here, so that `import pikv` does not import it

    return CupyGpu()


def sharding_for(model: ModelConfig, ranks: int, allocator: Allocator | None = None) -> Sharding:
    """By KV head, which sends least, where ranks divide the heads or are a multiple of them; else by token range.

    allocator: one that splits a budget among heads by scores needs the scores of all heads, so it goes by token range.
    """
    heads = {layer.kv_heads for layer in model.layers}
    divide = all(count % ranks == 0 or ranks % count == 0 for count in heads)
    if len(heads) > 1 or not divide or isinstance(allocator, ScoreAllocator):
        return TokenRange()
    return KvHeads()


def compose(
    model: ModelConfig,
    *,
    allocator: Allocator | None = None,
    token_selector: TokenSelector | None = None,
    page_selector: PageSelector | None = None,
    router: Router | None = None,
    compressor: Compressor | Sequence[Compressor] | None = None,
    budget_tokens: int | None = None,
    page_size: int = 64,
    tail_tokens: int = 128,
    when_full: FullPool | None = None,
    sharding: Sharding | None = None,
    transport: Transport | None = None,
    streamer: Streamer | None = None,
    tiers: Iterable[MemoryTier] = (),
    near_bytes: int | None = None,
    demotion: Demotion | None = None,
    predictor: PagePredictor | None = None,
    overlap: Overlap | None = None,
    prefix_store: PrefixStore | None = None,
    fetching: Fetching | None = None,
    backends: Iterable[Backend] | None = None,
    pool: PagePool | None = None,
) -> PiKVCache:
    """Wire parts into a cache. Parts left out are exact; a budget without an allocator is the same for all layers.

    compressor: of all layers, or a sequence of them, one for each layer.
    near_bytes: of pages that lie in the model's memory; by default all of it. The others go to the tiers.
    transport: of the ranks that store the cache together; without a sharding, `sharding_for` chooses one.

    Raises ConfigError for a combination that cannot work, with the reason and the nearest one that does.
    """
    if transport is not None and sharding is None:
        sharding = sharding_for(model, transport.size, allocator)
    runtime = RuntimeConfig(
        allocator=Uniform() if allocator is None and budget_tokens is not None else allocator,
        token_selector=KeepAll() if token_selector is None else token_selector,
        page_selector=page_selector,
        router=router,
        compressor=Exact() if compressor is None else compressor,
        budget_tokens=budget_tokens,
        page_size=page_size,
        tail_tokens=tail_tokens,
        when_full=Refuse() if when_full is None else when_full,
        sharding=sharding,
        transport=transport,
        streamer=streamer,
        tiers=tuple(tiers),
        demotion=LeastRecentlyRead() if demotion is None else demotion,
        predictor=predictor,
        overlap=overlap,
        prefix_store=prefix_store,
        fetching=FetchIfFaster() if fetching is None else fetching,
        backends=installed_backends(model.device) if backends is None else tuple(backends),
    )
    if near_bytes is not None:
        if pool is not None:
            raise ConfigError("near_bytes is for the pool that compose makes; a pool of your own has a capacity_bytes")
        pool = PagePool(model, runtime, capacity_bytes=near_bytes)
    return PiKVCache(model, runtime, pool=pool)


def runtime_from(names: Mapping[str, Any], model: ModelConfig, *, transport: Transport | None = None) -> RuntimeConfig:
    """Build a RuntimeConfig from names, as files and command lines have them.

    names: a part's name, or {"name": ..., setting: value}, for allocator, token_selector, page_selector, router,
    compressor, streamer, prefix_store, fetching, shard_by and when_full; for compressor also a list of them, one for
    each layer; whole numbers for budget_tokens, page_size and tail_tokens. None stands for left out. transport: as
    `compose` takes it.

    Raises UnknownNameError for a key or a name that does not exist, ConfigError for settings that cannot work.
    """
    given = {key: value for key, value in names.items() if value is not None}
    for key in given:
        if key not in PARTS and key not in NUMBERS:
            raise _unknown("key", key, [*PARTS, *NUMBERS])
    settings = {key: value if key in NUMBERS else _built(key, value) for key, value in given.items()}
    if "shard_by" in settings:
        settings["sharding"] = settings.pop("shard_by")
    elif transport is not None:
        settings["sharding"] = sharding_for(model, transport.size, settings.get("allocator"))
    if "budget_tokens" in settings:
        settings.setdefault("allocator", Uniform())
    return RuntimeConfig(transport=transport, backends=installed_backends(model.device), **settings)


def _built(key: str, value: Any) -> Any:
    """A part, or one for each layer."""
    if key == "compressor" and isinstance(value, list | tuple):
        return tuple(build(key, each) for each in value)
    return build(key, value)


def build(key: str, value: Any) -> Any:
    """One part from its name, or from {"name": ..., setting: value}; see runtime_from. key: the kind of part."""
    described = dict(value) if isinstance(value, Mapping) else {"name": value}
    known = PARTS[key]
    if "name" not in described:
        raise UnknownNameError(f'{key} needs a "name" beside {described}; it is one of {", ".join(sorted(known))}')
    name = described.pop("name")
    if not isinstance(name, str) or name not in known:
        raise _unknown(key, name, list(known))
    settings = {
        field: build(_PARTS_OF_PARTS[field], v) if field in _PARTS_OF_PARTS else v for field, v in described.items()
    }
    try:
        return known[name](**settings)
    except TypeError as error:
        takes = ", ".join(inspect.signature(known[name]).parameters) or "no settings"
        raise ConfigError(f"{key} {name!r} does not take {described}: {error}; it takes {takes}") from error


def _unknown(key: str, name: object, known: list[str]) -> UnknownNameError:
    close = difflib.get_close_matches(str(name), known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else "; choose one of these"
    return UnknownNameError(f"{key} must be one of {', '.join(sorted(known))}, got {name!r}{meant}")
