"""What a Prometheus server would read of pools' tiers."""

from __future__ import annotations

import pytest
import torch

import pikv
from pikv.core.host_tier import HostTier
from pikv.policies import AsLastStep, Quest

prometheus_client = pytest.importorskip(
    "prometheus_client", reason="prometheus_client is missing: pip install pikv[metrics]"
)
from pikv.adapters.prometheus import PoolCollector  # noqa: E402  # needs prometheus_client

MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=16)


@pytest.fixture
def cache():
    """One whose pages are for the most part far, in two tiers; it has decoded."""
    stride = pikv.RuntimeConfig(page_size=16).form(MODEL, 0).stride
    tiers = [HostTier(capacity_bytes=20 * stride), HostTier(capacity_bytes=200 * stride)]
    parts = {"page_selector": Quest(pages=2, dense_layers=0), "predictor": AsLastStep(), "tail_tokens": 16}
    cache = pikv.compose(MODEL, tiers=tiers, near_bytes=20 * stride, page_size=16, **parts)
    generator = torch.Generator().manual_seed(0)
    for position in range(200):
        for layer_id in range(2):
            k, v = torch.randn(2, 1, 2, 1, 16, generator=generator)
            cache.update(layer_id, position, k, v)
            cache.attend(layer_id, torch.randn(1, 4, 1, 16, generator=generator))
    return cache


def test_what_is_served_is_what_has_gone_through(cache):
    """In the text that a server reads, under labels of pool and tier."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(PoolCollector({"main": cache.pool}))
    text = prometheus_client.generate_latest(registry).decode()
    use = cache.pool.use()

    def value(name, **labels):
        return registry.get_sample_value(name, {"pool": "main"} | labels)

    assert use.tiers[1].pages_read > 0
    for number, tier in enumerate(use.tiers):
        labels = {"tier": "HostTier", "number": str(number)}
        assert value("pikv_tier_hits_total", **labels) == tier.hits
        assert value("pikv_tier_misses_total", **labels) == tier.misses
        assert value("pikv_tier_read_bytes_total", **labels) == tier.bytes_read
        assert value("pikv_tier_written_pages_total", **labels) == tier.pages_written
        assert value("pikv_tier_hidden_wait_seconds_total", **labels) == pytest.approx(tier.hidden_s)
        assert value("pikv_tier_exposed_wait_seconds_total", **labels) == pytest.approx(tier.exposed_s)
        assert value("pikv_tier_queue_depth", **labels) == 0
    assert value("pikv_near_hits_total") == use.near.hits
    assert value("pikv_pool_used_bytes") == cache.pool.used_bytes
    assert 'pikv_tier_read_seconds_total{number="1",pool="main",tier="HostTier"}' in text
    assert all(line.startswith(("# ", "pikv_")) for line in text.splitlines())


def test_a_pool_without_tiers_has_its_bytes():
    """And no tiers."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(PoolCollector({"plain": pikv.PiKVCache(MODEL).pool}))
    assert registry.get_sample_value("pikv_pool_used_bytes", {"pool": "plain"}) == 0
    assert "HostTier" not in prometheus_client.generate_latest(registry).decode()
