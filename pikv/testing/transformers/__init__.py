"""Is a transformers `Cache` as good as `DynamicCache`? Derive from a suite, say how yours is made, and run pytest."""

from pikv.testing.transformers.dense import DenseCacheConformance
from pikv.testing.transformers.programs import programs
from pikv.testing.transformers.suite import CacheConformance

__all__ = ["CacheConformance", "DenseCacheConformance", "programs"]
