"""Decoding with pages far away: how much of the time to fetch them is hidden by fetching ahead.

    python benchmarks/tiers.py --output docs/tables/tiers.md

The far tier is a model, not a device: main memory with a stated latency and bandwidth, kept by the clock. A cache twice
its near memory decodes; every layer reads the pages that Quest chooses. Keys and queries are random and drift slowly
from token to token and layer to layer, so that what is chosen changes; --drift says how fast. Contestants take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TypeVar

import attrs
import torch
from shared import tables
from tqdm import tqdm

import pikv
from pikv.core.host_tier import HostTier
from pikv.core.modelled_tier import ModelledTier
from pikv.core.tier_use import NearUse, PoolUse, TierUse
from pikv.policies import AsLastStep, AsThisLayer, FurthestLayer, Quest

MODEL = pikv.ModelConfig(layers=8, query_heads=32, kv_heads=8, head_dim=128)
PAGES = 80
LATENCY_S, BYTES_PER_S = 80e-6, 3e9
CXL_BYTES_PER_S = 25e9  # of one x8 link, for the computed row
CASES = {
    "all near": None,
    "far, no prefetch": None,
    "far, as last step": AsLastStep(),
    "far, as this layer": AsThisLayer(),
}
COLUMNS = (
    "case",
    "step, ms",
    "far pages a step",
    "fetching a layer, ms",
    "waited for, ms",
    "foreseen of chosen",
    "fetching ahead, ms",
    "of it right",
    "of that hidden",
)
WARM = 4  # steps that are not measured: pages that have never been far are written on their way there

Use = TypeVar("Use", NearUse, TierUse)


@attrs.define
class Decoding:
    """One contestant: its cache, the milliseconds of its steps, and what had gone through its tier before them."""

    cache: pikv.PiKVCache
    milliseconds: list[float] = attrs.field(factory=list)
    before: PoolUse | None = None
    chosen: tuple[int, int] = (0, 0)  # by predictor: pages chosen, and those of them that had been foreseen

    def forget(self) -> None:
        """What was measured so far."""
        self.milliseconds.clear()
        self.before = self.cache.pool.use()
        if self.cache.runtime.predictor is not None:
            self.chosen = self.cache.foresight.chosen, self.cache.foresight.both

    def use(self) -> PoolUse:
        """What has gone through since."""
        now, before = self.cache.pool.use(), self.before
        assert before is not None
        tiers = tuple(_difference(*pair) for pair in zip(now.tiers, before.tiers, strict=True))
        return attrs.evolve(now, near=_difference(now.near, before.near), tiers=tiers)

    def hit_rate(self) -> float:
        """The share of the pages chosen since that had been foreseen."""
        chosen, both = self.chosen
        return (self.cache.foresight.both - both) / max(1, self.cache.foresight.chosen - chosen)


def _difference(now: Use, before: Use) -> Use:
    """Counters, less what they were."""
    fields = (field.name for field in attrs.fields(type(now)) if field.name != "name")
    return attrs.evolve(now, **{name: getattr(now, name) - getattr(before, name) for name in fields})


def compose(name: str, tokens: int) -> pikv.PiKVCache:
    """A cache of the case, empty."""
    page_bytes = pikv.RuntimeConfig().form(MODEL, 0).stride
    everything = page_bytes * (tokens // 64 + 4) * 8 * len(MODEL.layers)
    parts = {"page_selector": Quest(pages=PAGES, dense_layers=0)}
    if name == "all near":
        return pikv.compose(MODEL, **parts)
    tier = ModelledTier(HostTier(capacity_bytes=2 * everything), latency_s=LATENCY_S, bytes_per_s=BYTES_PER_S)
    return pikv.compose(
        MODEL, tiers=[tier], near_bytes=everything // 2, demotion=FurthestLayer(), predictor=CASES[name], **parts
    )


def run(tokens: int, steps: int, drift: float) -> dict[str, Decoding]:
    """Fill the caches alike, then let them decode in turns."""
    contestants = {name: Decoding(compose(name, tokens)) for name in CASES}
    generator = torch.Generator().manual_seed(0)
    for start in tqdm(range(0, tokens, 1024), desc="prompt"):
        for layer_id in range(len(MODEL.layers)):
            k, v = torch.randn(2, 1, 8, 1024, 128, generator=generator)
            for each in contestants.values():
                each.cache.update(layer_id, start, k, v)
                each.cache.finish_prefill()
    query = torch.randn(1, 32, 1, 128, generator=generator)
    for step in tqdm(range(-WARM, steps), desc="decode"):
        if step == 0:
            for each in contestants.values():
                each.forget()
        inputs = []
        for _ in MODEL.layers:
            query = (1 - drift) * query + drift * torch.randn(1, 32, 1, 128, generator=generator)
            inputs.append((*torch.randn(2, 1, 8, 1, 128, generator=generator), query))
        for each in contestants.values():
            started = time.perf_counter()
            for layer_id, (k, v, q) in enumerate(inputs):
                each.cache.update(layer_id, tokens + WARM + step, k, v)
                each.cache.attend(layer_id, q)
            each.milliseconds.append(1e3 * (time.perf_counter() - started))
    return contestants


def row(name: str, each: Decoding, steps: int) -> tuple[str, ...]:
    """A line of the table."""
    step_ms = f"{statistics.median(each.milliseconds):.1f}"
    if each.cache.pool.residency is None:
        return (name, step_ms, *[""] * (len(COLUMNS) - 2))
    use = each.use()
    (tier,) = use.tiers
    ahead = each.cache.runtime.predictor is not None
    return (
        name,
        step_ms,
        f"{tier.pages_read / steps:.0f}",
        f"{1e3 * tier.read_s / steps / len(MODEL.layers):.1f}",
        f"{1e3 * tier.exposed_s / steps:.1f}",
        f"{each.hit_rate():.0%}" if ahead else "",
        f"{1e3 * tier.foreseen_s / steps:.1f}" if ahead else "",
        f"{use.near.used / max(1, use.near.foreseen):.0%}" if ahead else "",
        f"{use.hidden_of_right:.0%}" if ahead else "",
    )


def main() -> None:
    """Measure, and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--drift", type=float, default=0.05)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    contestants = run(arguments.tokens, arguments.steps, arguments.drift)
    near_ms = statistics.median(contestants["all near"].milliseconds)
    rows = [row(name, each, arguments.steps) for name, each in contestants.items()]
    page_bytes = pikv.RuntimeConfig().form(MODEL, 0).stride
    read_bytes = page_bytes * PAGES * 8 * len(MODEL.layers)
    rows.append(
        (
            "computed: half of what is read in place, CXL",
            f"{near_ms + 1e3 * read_bytes / 2 / CXL_BYTES_PER_S:.1f}",
            *[""] * (len(COLUMNS) - 2),
        )
    )
    text = "\n\n".join(
        [
            f"{len(MODEL.layers)} layers, 8 KV heads, head_dim 128, float32; {arguments.tokens} tokens, near memory "
            f"for half of them; Quest reads {PAGES} pages a head. The far tier is a model: {LATENCY_S * 1e6:.0f} us, "
            f"{BYTES_PER_S / 1e9:.0f} GB/s. Medians of {arguments.steps} steps, drift {arguments.drift}. "
            f"{tables.machine()}. A page takes its share of the time to fetch ahead; hidden is what nobody waited "
            "for of the time of pages foreseen rightly; every wait for pages fetched ahead counts against it.",
            tables.command(),
            tables.markdown(COLUMNS, rows).rstrip(),
        ]
    )
    tables.save(text + "\n", arguments.output)


if __name__ == "__main__":
    main()
