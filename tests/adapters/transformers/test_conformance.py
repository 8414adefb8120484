"""PiKV under the suite for transformers caches: exact parts answer as DynamicCache does."""

from __future__ import annotations

from contextlib import contextmanager
from types import MappingProxyType

import pytest

import pikv
from pikv.adapters.transformers import attach
from pikv.testing.transformers import CacheConformance


class Attached(CacheConformance):
    """With a host for as long as `prepare` lasts."""

    runtime = pikv.RuntimeConfig()

    @contextmanager
    def prepare(self, model):
        with attach(model, self.runtime) as self.host:
            yield

    def make(self, model):
        return self.host.new_cache()


class TestByDefault(Attached):
    pass


class TestManyPages(Attached):
    """Pages of 16 and a tail of 4 tokens, so that short dialogues seal pages too."""

    runtime = pikv.RuntimeConfig(page_size=16, tail_tokens=4)


@pytest.mark.slow
class TestInt8(Attached):
    """Rounded pages move as exact ones do."""

    runtime = MappingProxyType({"compressor": "int8", "page_size": 16, "tail_tokens": 4})
    logit_tolerance = 0.4
