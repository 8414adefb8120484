"""What moe_decode.py composes: a cache on the ranks' transport, which may have far memory and overlap."""

from __future__ import annotations

import argparse
from pathlib import Path

import attrs
from mixtral import MixtralConfig
from moe_checks import Wire

import pikv
from pikv.core.host_tier import HostTier
from pikv.core.modelled_tier import ModelledTier
from pikv.core.overlap import Overlap
from pikv.core.ports import Transport
from pikv.core.timeline import Timeline
from pikv.policies import AsThisLayer, ExpertGroups, FurthestLayer

CHOSEN = ("allocator", "token_selector", "page_selector", "compressor", "router", "shard_by")  # by name
COMPOSED = (*CHOSEN, "budget_tokens", "tail_tokens", "page_size")
LAYERS_NEAR = 2  # the one that is read, and the one that is fetched


@attrs.frozen(kw_only=True)
class Composed:
    """A cache, what counts what is sent, and what overlaps, if anything does."""

    cache: pikv.PiKVCache
    wire: Wire
    overlap: Overlap | None

    def hidden(self) -> str:
        """Times of the whole run on this rank: what each kind of work took, and how much of it was waited for."""
        lines = [] if self.overlap is None else [self.overlap.report()]
        if self.cache.pool.residency is not None:
            (use,) = self.cache.pool.residency.stack.use
            share = max(0.0, 1 - use.exposed_s / use.read_s) if use.read_s else 0.0
            lines.append(
                f"far tier, a model: {use.read_s:.3f} s of reads, {use.exposed_s:.3f} s exposed, {share:.0%} hidden"
            )
        return "\n".join(["Overlap: none", *lines] if self.overlap is None else ["Overlap:", *lines])

    def write_timeline(self, file: Path, transport: Transport) -> None:
        """Write a Chrome trace of all ranks, on rank 0; all ranks call it."""
        trace = (Timeline() if self.overlap is None else self.overlap.timeline).trace(transport)
        if transport.rank == 0:
            file.write_text(trace, "utf-8")


def far_tier(text: str) -> tuple[float, float]:
    """Seconds and bytes a second from "MS:GB"."""
    try:
        latency_ms, gigabytes = map(float, text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be MS:GB, two numbers such as 2:1, got {text!r}") from error
    return latency_ms * 1e-3, gigabytes * 1e9


def slow_rank(text: str) -> tuple[int, float]:
    """A rank and seconds from "RANK:MS"."""
    try:
        rank, milliseconds = text.split(":")
        return int(rank), float(milliseconds) * 1e-3
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be RANK:MS, two numbers such as 1:5, got {text!r}") from error


def compose(arguments: argparse.Namespace, config: MixtralConfig, transport: Transport, tokens: int) -> Composed:
    """The cache that the arguments name. tokens: how many it will hold, which says what is near and what is far."""
    overlap = Overlap(transport) if arguments.overlap else None
    wire = Wire.over(transport if overlap is None else overlap)
    described = model_config(config)
    names = {name: getattr(arguments, name) for name in COMPOSED if getattr(arguments, name) is not None}
    if arguments.shard_by == "experts":
        names = {"router": "top_k"} | names
    runtime, near_bytes = pikv.runtime_from(names, described, transport=wire.attention), None
    if arguments.far_tier is not None:
        runtime, near_bytes = with_far(runtime, described, arguments.far_tier, overlap, tokens)
    pool = pikv.PagePool(described, runtime, capacity_bytes=near_bytes)
    return Composed(cache=pikv.PiKVCache(described, runtime, pool=pool), wire=wire, overlap=overlap)


def with_far(
    runtime: pikv.RuntimeConfig,
    model: pikv.ModelConfig,
    speed: tuple[float, float],
    overlap: Overlap | None,
    tokens: int,
) -> tuple[pikv.RuntimeConfig, int]:
    """The runtime with far memory, and the bytes of pages near: of the share that a rank stores of a few layers."""
    ranks = 1 if isinstance(runtime.sharding, ExpertGroups) else runtime.places  # the gate may send one rank everything
    pages = -(-tokens // (ranks * runtime.page_size)) + 2
    near = LAYERS_NEAR * model.layers[0].kv_heads * pages * runtime.form(model, 0).stride
    latency_s, bytes_per_s = speed
    store = HostTier(capacity_bytes=2 * len(model.layers) * near)
    return attrs.evolve(
        runtime,
        tiers=[ModelledTier(store, latency_s=latency_s, bytes_per_s=bytes_per_s)],
        demotion=FurthestLayer(),
        predictor=None if overlap is None else AsThisLayer(),
        overlap=overlap,
    ), near


def model_config(config: MixtralConfig) -> pikv.ModelConfig:
    """Describe the model to PiKV."""
    return pikv.ModelConfig(
        layers=config.layers,
        query_heads=config.query_heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        window=config.window,
        rotary=config.rotary,
        experts=config.experts,
        experts_per_token=config.experts_per_token,
    )
