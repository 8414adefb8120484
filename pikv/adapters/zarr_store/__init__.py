"""Zarr arrays in a folder, in memory or in an object store."""

from pikv.adapters.zarr_store.streamer import ZarrStreamer

__all__ = ["ZarrStreamer"]
