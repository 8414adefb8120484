"""Zarr arrays in a folder, in memory or in an object store."""

from pikv.adapters.zarr_store.inspection import Inspection
from pikv.adapters.zarr_store.prefixes import StoredPrefixes
from pikv.adapters.zarr_store.streamer import ZarrStreamer
from pikv.adapters.zarr_store.tier import ZarrTier

__all__ = ["Inspection", "StoredPrefixes", "ZarrStreamer", "ZarrTier"]
