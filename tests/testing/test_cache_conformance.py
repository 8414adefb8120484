"""The suite for transformers caches, on transformers' own."""

from __future__ import annotations

from transformers import DynamicCache

from pikv.testing.transformers import DenseCacheConformance


class TestDynamicCache(DenseCacheConformance):
    def make(self, model):
        return DynamicCache(config=model.config)
