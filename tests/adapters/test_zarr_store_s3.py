"""The Zarr store in an S3 bucket, of a server on this machine."""

from __future__ import annotations

import pytest
import torch
from moto.server import ThreadedMotoServer
from object_store import ObjectStoreConformance, ObjectStorePrefixes
from s3_server import make_bucket, serving, store_of

import pikv
from pikv.adapters.zarr_store import ZarrStreamer
from pikv.testing.memory_tier import numbers, pages_of
from pikv.testing.streamer import check_pages, manifest_of


@pytest.fixture(scope="module")
def server():
    with serving() as endpoint:
        yield endpoint


def bucket(endpoint, name, **options):
    make_bucket(endpoint, name)
    return store_of(endpoint, name, **options)


class TestS3(ObjectStoreConformance):
    @pytest.fixture(autouse=True)
    def bucket(self, server, request):
        self.store = bucket(server, f"test-{abs(hash(request.node.name))}")

    @pytest.mark.slow  # hundreds of requests
    def test_it_equals_a_list_of_versions(self):
        super().test_it_equals_a_list_of_versions()

    @pytest.mark.slow  # thousands
    def test_no_damage_goes_unnoticed(self):
        super().test_no_damage_goes_unnoticed()


class TestS3Prefixes(ObjectStorePrefixes):
    @pytest.fixture(autouse=True)
    def bucket(self, server, request):
        self.store = bucket(server, f"test-{abs(hash(request.node.name))}")

    @pytest.mark.slow  # hundreds of requests
    def test_it_equals_a_set_of_pages(self):
        super().test_it_equals_a_set_of_pages()


def test_a_cache_goes_on_from_a_bucket(server):
    """Committed here, restored as another machine would."""
    model = pikv.ModelConfig(layers=2, query_heads=2, kv_heads=2, head_dim=16)
    store, generator = bucket(server, "caches"), torch.Generator().manual_seed(0)
    cache = pikv.compose(model, page_size=16, tail_tokens=16, streamer=ZarrStreamer(store))
    for layer_id in range(2):
        k, v, q = torch.randn(3, 1, 2, 100, 16, generator=generator)
        cache.update(layer_id, 0, k, v)
        cache.attend(layer_id, q)
    cache.commit()
    runtime = pikv.RuntimeConfig(page_size=16, tail_tokens=16, streamer=ZarrStreamer(store))
    restored = pikv.PiKVCache.restore(model, runtime)
    for layer_id in range(2):
        assert torch.equal(restored.retrieve(layer_id).keys, cache.retrieve(layer_id).keys)


def test_a_server_that_goes_away_loses_nothing():
    """StoreError, in time; what was committed is there when the server is."""
    first = ThreadedMotoServer(port=0, verbose=False)
    first.start()
    host, port = first.get_host_and_port()
    store = bucket(f"http://{host}:{port}", "gone", retry_config={"max_retries": 0})
    with ZarrStreamer(store) as streamer:
        streamer.append(numbers(1), pages_of(numbers(1)))
        version = streamer.commit(manifest_of(1))
        first.stop()
        streamer.append(numbers(2), pages_of(numbers(2)))
        with pytest.raises(pikv.StoreError, match="what was committed before is unchanged"):
            streamer.commit(manifest_of(1, 2))
        again = ThreadedMotoServer(port=port, verbose=False)  # the same state, since it is the process's
        again.start()
        assert streamer.versions() == [version]
        check_pages(streamer, version, 1)
        assert not streamer.holds(numbers(2))
        streamer.append(numbers(2), pages_of(numbers(2)))
        check_pages(streamer, streamer.commit(manifest_of(1, 2)), 1, 2)
        again.stop()


def test_a_bucket_that_is_not_there_is_said(server):
    """StoreError when the store is opened."""
    with pytest.raises(pikv.StoreError, match=r"opening .* failed"):
        ZarrStreamer(store_of(server, "nowhere"))
