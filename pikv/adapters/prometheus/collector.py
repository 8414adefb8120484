"""PoolCollector: the use of pools' tiers as metrics of prometheus_client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from pikv.core.pool import PagePool
from pikv.core.tier_use import PoolUse

_OF_TIERS = {
    "hits": ("pikv_tier_hits", "pages that no nearer tier had, and this one had"),
    "misses": ("pikv_tier_misses", "pages that no nearer tier had, nor this one"),
    "pages_read": ("pikv_tier_read_pages", "pages that have come back"),
    "bytes_read": ("pikv_tier_read_bytes", "bytes that have come back"),
    "read_s": ("pikv_tier_read_seconds", "time that reads took"),
    "pages_written": ("pikv_tier_written_pages", "pages that went far"),
    "bytes_written": ("pikv_tier_written_bytes", "bytes that went far"),
    "write_s": ("pikv_tier_write_seconds", "time that writes took"),
    "exposed_s": ("pikv_tier_exposed_wait_seconds", "time that somebody stood still for reads"),
    "hidden_s": ("pikv_tier_hidden_wait_seconds", "time of reads begun ahead that nobody waited for"),
    "failures": ("pikv_tier_failures", "reads and writes that failed"),
}
_OF_NEAR = {
    "hits": ("pikv_near_hits", "pages that layers asked for and that lay near"),
    "coming": ("pikv_near_coming", "pages that layers asked for and that were on their way"),
    "misses": ("pikv_near_misses", "pages that layers asked for and that were far"),
    "foreseen": ("pikv_near_foreseen", "pages that were fetched ahead"),
    "used": ("pikv_near_foreseen_used", "pages that were fetched ahead and asked for"),
}


@final
class PoolCollector(Collector):
    """Reads pools' counters whenever it is asked: `prometheus_client.REGISTRY.register(PoolCollector({"main": pool}))`.

    pools: by the names that become the label "pool". Tiers have the labels "tier", their kind, and "number", their
    place in the order in which they are filled.
    """

    def __init__(self, pools: Mapping[str, PagePool]) -> None:
        self._pools = dict(pools)

    def collect(self) -> Iterable[Metric]:
        """All metrics as they are now."""
        uses = {name: pool.use() for name, pool in self._pools.items()}
        for field, (name, text) in _OF_NEAR.items():
            counter = CounterMetricFamily(name, text, labels=["pool"])
            for pool, use in uses.items():
                counter.add_metric([pool], getattr(use.near, field))
            yield counter
        for field, (name, text) in _OF_TIERS.items():
            yield _by_tier(CounterMetricFamily(name, text, labels=["pool", "tier", "number"]), field, uses)
        gauge = GaugeMetricFamily("pikv_tier_queue_depth", "calls that wait", labels=["pool", "tier", "number"])
        yield _by_tier(gauge, "queued", uses)
        for field, text in (("used_bytes", "bytes of all pages"), ("near_bytes", "bytes that may lie near")):
            held = GaugeMetricFamily(f"pikv_pool_{field}", text, labels=["pool"])
            for pool, use in uses.items():
                held.add_metric([pool], getattr(use, field))
            yield held


def _by_tier(
    family: CounterMetricFamily | GaugeMetricFamily, field: str, uses: Mapping[str, PoolUse]
) -> CounterMetricFamily | GaugeMetricFamily:
    for pool, use in uses.items():
        for number, tier in enumerate(use.tiers):
            family.add_metric([pool, tier.name, str(number)], getattr(tier, field))
    return family
