"""The facts that a transformers `Cache` must hold to in front of a model, as tests to inherit.

class TestMine(CacheConformance):
    def make(self, model: PreTrainedModel) -> Cache:
        return Mine(model.config)
"""

from __future__ import annotations

from pikv.testing.transformers.forward import ForwardConformance
from pikv.testing.transformers.generate import GenerateConformance


class CacheConformance(ForwardConformance, GenerateConformance):
    """Inherit, and say what `make` makes.

    Each test does the same with that cache and with a DynamicCache and compares the answers of two small models. The
    suite of a cache whose `update` returns dense keys and values derives from DenseCacheConformance instead.
    """
