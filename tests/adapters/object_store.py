"""The streamer suite on any store of obstore."""

from __future__ import annotations

import obstore

from pikv.adapters.zarr_store import ZarrStreamer
from pikv.testing.memory_tier import PAGE_BYTES
from pikv.testing.streamer import StreamerConformance


class ObjectStoreConformance(StreamerConformance):
    """Versions in `store`, which who derives from this sets for each test."""

    def open(self):
        return ZarrStreamer(self.store, segment_bytes=2 * PAGE_BYTES)

    def objects(self):
        names = [each["path"] for some in obstore.list(self.store) for each in some]
        return {name: bytes(obstore.get(self.store, name).bytes()) for name in names}

    def put(self, name, states):
        if states is None:
            obstore.delete(self.store, name)
        else:
            obstore.put(self.store, name, states)
