"""Damage to a store of commits in a folder, page by page."""

from __future__ import annotations

from pathlib import Path

from pikv.core.cache import PiKVCache


def flip(folder: Path, cache: PiKVCache, layer_id: int, sequence: int, kv_head: int, page: int) -> int:
    """Change a bit of a page where a ZarrStreamer has stored it; returns the page's key."""
    layer = cache._layers[layer_id]
    held = layer.table.ids[sequence, kv_head, page].view(1)
    stored = bytes(layer.pool.bytes_of(layer.codec.form, held)[0].tolist())
    (path,) = [path for path in (folder / "segments").rglob("0.0") if stored in path.read_bytes()]
    whole = bytearray(path.read_bytes())
    whole[whole.index(stored) + 77] ^= 4
    path.write_bytes(whole)
    return int(layer.pool.names(held)[0])
