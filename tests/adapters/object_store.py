"""The suites of streamers and of prefix stores on any store of obstore."""

from __future__ import annotations

import obstore

from pikv.adapters.zarr_store import StoredPrefixes, ZarrStreamer
from pikv.testing.memory_tier import PAGE_BYTES
from pikv.testing.prefix_store import PrefixStoreConformance
from pikv.testing.streamer import StreamerConformance


class ObjectsOfStore:
    """What lies in `store`, which who derives from this sets for each test."""

    def objects(self):
        names = [each["path"] for some in obstore.list(self.store) for each in some]
        return {name: bytes(obstore.get(self.store, name).bytes()) for name in names}

    def put(self, name, states):
        if states is not None:
            obstore.put(self.store, name, states)
        elif name in self.objects():
            obstore.delete(self.store, name)


class ObjectStoreConformance(ObjectsOfStore, StreamerConformance):
    def open(self):
        return ZarrStreamer(self.store, segment_bytes=2 * PAGE_BYTES)


class ObjectStorePrefixes(ObjectsOfStore, PrefixStoreConformance):
    def open(self):
        return StoredPrefixes(self.store)
