"""Manifests: the document of a version, and the array that holds its states."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from pikv.adapters.zarr_store import arrays
from pikv.core.errors import DamagedError, VersionError

FORMAT = 1
FOLDER = "manifests"
STATES = "states"
_DTYPES = {
    name: getattr(torch, name)
    for name in ["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
}


def name_of(number: int) -> str:
    """The object that holds a version's document; names sort as versions do."""
    return f"{FOLDER}/{number:012d}"


def number_of(name: str) -> int | None:
    """The version whose document has this name; None for what is none."""
    found = re.fullmatch(rf"{FOLDER}/(\d{{12}})", name)
    return int(found.group(1)) if found else None


@attrs.frozen(kw_only=True)
class Document:
    """What the document of a version says. segments: name and CRC-32C of the metadata of each that it needs.

    states: the name of the array, and of each tensor there its dtype, shape, offset in bytes and CRC-32C.
    """

    number: int
    facts: Mapping[str, Any]
    segments: Mapping[str, int]
    states: str
    tensors: Mapping[str, tuple[str, list[int], int, int]]

    def encoded(self) -> bytes:
        """CRC-32C of the JSON that follows, in 8 hexadecimal digits, and a new line."""
        said = {"format": FORMAT, **attrs.asdict(self)}
        text = json.dumps(said, separators=(",", ":")).encode()
        return b"%08x\n" % arrays.checksum(text) + text

    @classmethod
    def decoded(cls, number: int, document: bytes) -> Document:
        """Raises DamagedError; VersionError for a newer format."""
        what = f"the manifest of version {number}"
        head, text = document[:9], document[9:]
        if not re.fullmatch(rb"[0-9a-f]{8}\n", head):
            raise DamagedError(f"{what} is damaged: it does not begin with a checksum")
        arrays.check(text, int(head, 16), what)
        said = json.loads(text)
        check_format(said.pop("format"), what)
        return cls(**said)


def check_format(number: int, what: str) -> None:
    """Raise VersionError for a format that is newer than this one."""
    if number > FORMAT:
        raise VersionError(f"{what} has format {number}, and this PiKV reads up to {FORMAT}; use a newer PiKV")


def check_root(root: bytes, where: str) -> None:
    """Raise VersionError unless this is the zarr.json of a PiKV store, of a format that is known."""
    try:
        number = arrays.attributes(root)["pikv_format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise VersionError(
            f"{where}: its zarr.json is not that of a PiKV store, or is damaged; give PiKV a folder of its own"
        ) from error
    check_format(number, where)


def packed(states: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, tuple[str, list[int], int, int]]]:
    """All states in one run of bytes, each at a multiple of 64, and where each lies."""
    runs, tensors, offset = [], {}, 0
    for name, state in states.items():
        run = state.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
        dtype = str(state.dtype).removeprefix("torch.")
        tensors[name] = (dtype, list(state.shape), offset, arrays.checksum(run))
        runs += [run, torch.zeros(-len(run) % 64, dtype=torch.uint8)]
        offset += len(runs[-2]) + len(runs[-1])
    return torch.cat([torch.empty(0, dtype=torch.uint8), *runs]), tensors


def unpacked(run: Tensor, document: Document) -> dict[str, Tensor]:
    """The states by name, each checked. Raises DamagedError, which names the state."""
    states = {}
    for name, (dtype, shape, offset, expected) in document.tensors.items():
        empty = torch.empty(shape, dtype=_DTYPES[dtype])
        part = run[offset : offset + empty.nbytes]
        arrays.check(part, expected, f"version {document.number}: state {name!r}")
        states[name] = part.clone().view(_DTYPES[dtype]).view(shape) if len(part) else empty
    return states


def states_bytes(document: Document) -> int:
    """How long the run of the states is."""
    ends = [
        offset + -(-torch.empty(shape, dtype=_DTYPES[dtype], device="meta").nbytes // 64) * 64
        for dtype, shape, offset, _ in document.tensors.values()
    ]
    return max(ends, default=0)
