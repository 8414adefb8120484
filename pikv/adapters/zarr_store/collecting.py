"""What belongs to no version any more."""

from __future__ import annotations

import time

from pikv.adapters.zarr_store import manifests
from pikv.adapters.zarr_store.objects import Objects
from pikv.adapters.zarr_store.segments import FOLDER


def litter(objects: Objects, segments: set[str], states: set[str], *, prefix: str, grace_s: float) -> list[str]:
    """The objects of all arrays but these, and partial documents.

    prefix: of the arrays that this process has written. Others may be about to be committed by their writers, so they
    count only when they are older than grace_s.
    """
    old = time.time() - grace_s
    found = [
        name
        for folder, kept in ((FOLDER, segments), (manifests.STATES, states))
        for name, written in objects.list(folder).items()
        if _array_of(name) not in (None, *kept) and (name.startswith(f"{folder}/{prefix}") or written < old)
    ]
    documents = objects.list(manifests.FOLDER).items()
    return found + [name for name, written in documents if manifests.number_of(name) is None and written < old]


def _array_of(name: str) -> str | None:
    """The array that an object is part of; None for the metadata of a group."""
    parts = name.split("/")
    return parts[1] if len(parts) == 3 else None
