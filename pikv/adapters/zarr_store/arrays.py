"""What makes objects Zarr: the metadata of a group, and of an array that is one chunk without a codec."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import google_crc32c
from torch import Tensor

from pikv.core.errors import DamagedError


def group(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a group."""
    return _encoded({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)})


def array(shape: tuple[int, ...], attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a uint8 array whose only chunk, `chunk_name(shape)`, holds its bytes as they are."""
    return _encoded(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in shape]}},
            "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
            "fill_value": 0,
            "codecs": [{"name": "bytes"}],
            "attributes": dict(attributes),
        }
    )


def chunk_name(shape: tuple[int, ...]) -> str:
    """The name of the only chunk within its array: "0.0" for two dimensions."""
    return ".".join("0" for _ in shape)


def _encoded(metadata: Mapping[str, Any]) -> bytes:
    return json.dumps(metadata, separators=(",", ":")).encode()


def attributes(metadata: bytes) -> dict[str, Any]:
    """The attributes of a zarr.json."""
    found: dict[str, Any] = json.loads(metadata)["attributes"]
    return found


def checksum(states: bytes | Tensor) -> int:
    """CRC-32C of bytes, or of a tensor uint8 [n]."""
    return int(google_crc32c.value(states if isinstance(states, bytes) else states.numpy()))


def checksums(pages: Tensor, rows: Iterable[int]) -> list[int]:
    """CRC-32C of these rows of pages uint8 [n, page_bytes]."""
    memory = pages.numpy()
    return [google_crc32c.value(memory[row]) for row in rows]


def check(states: bytes | Tensor, expected: int, what: str) -> None:
    """Raise DamagedError unless the checksum is the expected one."""
    got = checksum(states)
    if got != expected:
        raise DamagedError(f"{what} is damaged: its CRC-32C is {got:08x}, {expected:08x} was written")
