"""Segments: arrays of pages that were written together, and the catalog of which page is in which."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor

from pikv.adapters.zarr_store import arrays
from pikv.core.errors import PageLostError

FOLDER = "segments"


@attrs.frozen(kw_only=True, eq=False)
class Segment:
    """An array uint8 [pages, page_bytes], and in its attributes the key and the CRC-32C of each page.

    keys: int64 [pages]. checksums: int64 [pages].
    """

    name: str
    page_bytes: int
    keys: Tensor
    checksums: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the array."""
        return len(self.keys), self.page_bytes

    @property
    def chunk(self) -> str:
        """The name of the object that holds the pages, one after another."""
        return f"{FOLDER}/{self.name}/{arrays.chunk_name(self.shape)}"

    @property
    def metadata(self) -> str:
        """The name of the object that holds `encoded()`."""
        return f"{FOLDER}/{self.name}/zarr.json"

    @functools.cached_property
    def checksum(self) -> int:
        """CRC-32C of `encoded()`, by which a manifest knows the segment."""
        return arrays.checksum(self.encoded())

    def encoded(self) -> bytes:
        """The array's zarr.json: little-endian int64 keys and uint32 checksums, in base64."""
        return arrays.array(
            self.shape,
            {
                "page_bytes": self.page_bytes,
                "keys": base64.b64encode(self.keys.numpy().astype("<i8").tobytes()).decode(),
                "crc32c": base64.b64encode(self.checksums.numpy().astype("<u4").tobytes()).decode(),
            },
        )

    @classmethod
    def decoded(cls, name: str, metadata: bytes) -> Segment:
        """The segment of a zarr.json."""
        attributes = arrays.attributes(metadata)
        keys, checksums = (bytearray(base64.b64decode(attributes[field])) for field in ("keys", "crc32c"))
        return cls(
            name=name,
            page_bytes=attributes["page_bytes"],
            keys=torch.frombuffer(keys, dtype=torch.int64) if keys else torch.empty(0, dtype=torch.int64),
            checksums=(torch.frombuffer(checksums, dtype=torch.int32) if checksums else torch.empty(0)).long()
            & 0xFFFFFFFF,
        )


@attrs.define
class Catalog:
    """The pages of some segments, by key."""

    segments: list[Segment] = attrs.field(factory=list)
    _keys: Tensor = attrs.field(factory=lambda: torch.empty(0, dtype=torch.int64), init=False)
    _places: Tensor = attrs.field(factory=lambda: torch.empty(0, dtype=torch.int64), init=False)
    """Of each key, in their order, the number of its segment * 2^32 + its row there."""

    def __attrs_post_init__(self) -> None:
        self._rebuild()

    def _rebuild(self) -> None:
        keys = torch.cat([torch.empty(0, dtype=torch.int64), *(segment.keys for segment in self.segments)])
        places = [(i << 32) + torch.arange(len(segment.keys)) for i, segment in enumerate(self.segments)]
        order = torch.from_numpy(keys.numpy().argsort(kind="stable"))  # quick where keys come in runs, as they do
        self._keys, self._places = keys[order], torch.cat([torch.empty(0, dtype=torch.int64), *places])[order]

    def add(self, segments: Iterable[Segment]) -> None:
        """Take segments in."""
        self.segments.extend(segments)
        self._rebuild()

    def keep(self, names: set[str]) -> None:
        """Forget all segments but these."""
        self.segments = [segment for segment in self.segments if segment.name in names]
        self._rebuild()

    def contains(self, keys: Tensor) -> Tensor:
        """Which of keys int64 [n] are in a segment: bool [n]."""
        return contains(self._keys, keys)

    def find(self, keys: Tensor) -> Iterator[tuple[Segment, Tensor, Tensor]]:
        """For each segment: which of keys int64 [n] are in it, int64 [m], and their rows, int64 [m], ascending.

        Raises PageLostError for a key in none.
        """
        known = self.contains(keys)
        if not bool(known.all()):
            lost = keys[~known].tolist()
            raise PageLostError(f"store: it holds no page with key {lost[0]} ({len(lost)} such)")
        found = self._places[torch.searchsorted(self._keys, keys)] if len(keys) else keys
        index = torch.from_numpy(found.numpy().argsort(kind="stable"))
        places = found[index]
        numbers, counts = (places >> 32).unique_consecutive(return_counts=True)
        parts = index.split(counts.tolist()), (places & 0xFFFFFFFF).split(counts.tolist())
        for number, which, rows in zip(numbers.tolist(), *parts, strict=True):
            yield self.segments[number], which, rows


def contains(held: Tensor, keys: Tensor) -> Tensor:
    """Which of keys int64 [n] are among held int64 [m], ascending: bool [n]."""
    if not len(held):
        return torch.zeros(len(keys), dtype=torch.bool)
    return held[torch.searchsorted(held, keys).clamp(max=len(held) - 1)] == keys
