"""What goes through tiers, for Prometheus."""

from pikv.adapters.prometheus.collector import PoolCollector

__all__ = ["PoolCollector"]
