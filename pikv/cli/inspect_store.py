"""`pikv inspect`: what a store of commits holds, and whether all of it is as it was written."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from pikv.core.errors import ConfigError, DamagedError, InputError, VersionError
from pikv.core.lost import LostPage, lost_pages
from pikv.core.ports import Manifest, Version
from pikv.core.tables import ABSENT

EXAMPLES = """examples:
  pikv inspect checkpoints
  pikv inspect checkpoints --version 3 --version 4
  pikv inspect s3://bucket/checkpoints --json
  pikv inspect checkpoints --list

Every page, state and document of the versions is read and its checksum compared; a page that several versions share is
read once. The store is not changed. Exit codes: 0, all is as it was written; 1, something is missing or damaged; 2, the
command cannot be carried out. A store such as s3://... takes its credentials as obstore does, from the environment.
"""
DAMAGED = 1  # the exit code
SHOWN = 20  # lost pages of a version, before they are counted only


def add_to(commands: Any) -> None:
    """Add the command to those of `pikv`."""
    parser = commands.add_parser(
        "inspect",
        help="show the versions of a store, and verify every checksum",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, interrupted="the store is as it was")
    parser.add_argument("store", help="the folder that ZarrStreamer was given, or a URL that obstore knows")
    parser.add_argument(
        "--version", type=int, action="append", metavar="NUMBER", help="inspect this one; all else; may be given again"
    )
    parser.add_argument("--list", action="store_true", help="do not read the pages")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


@attrs.frozen(kw_only=True)
class LayerPages:
    """The pages of one layer in a version; one that several sequences share counts once."""

    layer: int
    pages: int
    bytes: int


@attrs.frozen(kw_only=True)
class Inspected:
    """A version. damage: of its document or states, None if there is none; then no more is known of it.

    state_bytes: of tails, tables and the rest. new_pages: those that no older one of those inspected has.
    damaged_pages: how many are missing or damaged, None if they were not read; lost: where they are.
    """

    version: int
    committed: str
    damage: str | None = None
    sequences: int = 0
    tokens: int = 0
    pages: int = 0
    page_bytes: int = 0
    new_pages: int = 0
    state_bytes: int = 0
    layers: tuple[LayerPages, ...] = ()
    damaged_pages: int | None = None
    lost: tuple[LostPage, ...] = ()
    components: Any = None

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.damage is not None:
            return "DAMAGED"
        if self.damaged_pages is None:
            return "not read"
        return f"{self.damaged_pages} PAGES LOST" if self.damaged_pages else "good"


def run(arguments: argparse.Namespace) -> int:
    """Inspect, and print what was found."""
    inspection = _opened(arguments.store)
    committed = inspection.versions()
    chosen = _chosen(arguments.version, committed, arguments.store)
    found = _inspect(inspection, committed, chosen, reads=not arguments.list)
    if arguments.json:
        print(json.dumps({"store": arguments.store, "versions": [attrs.asdict(each) for each in found]}, indent=2))
    else:
        print(_text(arguments.store, found))
    return DAMAGED if any(each.damage or each.damaged_pages for each in found) else 0


def _opened(store: str) -> Any:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        from pikv.adapters.zarr_store import Inspection
    except ImportError as error:
        raise ConfigError(f"pikv inspect needs pikv[zarr]: {error}; pip install pikv[zarr]") from error
    if "://" not in store:
        return Inspection(store)
    try:
        return Inspection(from_url(store))
    except (BaseError, ValueError) as error:
        raise InputError(f"{store} is no URL of a store that can be opened: {str(error).splitlines()[0]}") from error


def _chosen(numbers: list[int] | None, committed: Iterable[Version], store: str) -> list[Version]:
    there = list(committed)
    unknown = sorted(set(numbers or ()) - {version.number for version in there})
    if unknown:
        known = ", ".join(map(str, there)) or "none"
        raise VersionError(f"{store} has no version {unknown[0]}, it has: {known}")
    return [version for version in there if numbers is None or version.number in numbers]


def _inspect(
    inspection: Any, committed: dict[Version, float], chosen: Sequence[Version], *, reads: bool
) -> list[Inspected]:
    """All chosen versions, oldest first; a bar shows the bytes that are read."""
    from tqdm import tqdm

    found, older = [], set[int]()
    with tqdm(total=0, unit="B", unit_scale=True, disable=not reads) as progress:
        for version in chosen:
            progress.set_postfix_str(f"version {version}")
            said: dict[str, Any] = {"version": version.number, "committed": _moment(committed[version])}
            try:
                opened = inspection.open(version)
            except DamagedError as error:
                found.append(Inspected(**said, damage=str(error)))
                continue
            keys = {key for keys in opened.keys.values() for key in keys.tolist()}
            if reads:
                progress.total += inspection.unread_bytes(opened)
                damaged = inspection.damaged(opened, progress.update)
                said |= {"damaged_pages": len(damaged), "lost": tuple(lost_pages(opened.manifest, damaged))}
            found.append(Inspected(**said, **_described(opened.manifest), new_pages=len(keys - older)))
            older |= keys
    return found


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).isoformat(timespec="seconds")


def _described(manifest: Manifest) -> dict[str, Any]:
    layers = [
        LayerPages(layer=int(number), pages=count, bytes=count * layer["record_bytes"])
        for number, layer in manifest.facts.get("layers", {}).items()
        for count in [_count(manifest, int(number))]
    ]
    newest = [manifest.states[f"layers.{layer.layer}.last"] for layer in layers]
    return {
        "components": manifest.facts.get("components"),
        "sequences": len(newest[0]) if newest else 0,
        "tokens": max((int(each.max()) + 1 for each in newest if len(each)), default=0),
        "pages": sum(len(keys) for keys in manifest.pages.values()),
        "page_bytes": sum(len(keys) * length for length, keys in manifest.pages.items()),
        "state_bytes": sum(state.nbytes for state in manifest.states.values()),
        "layers": tuple(layers),
    }


def _count(manifest: Manifest, layer_id: int) -> int:
    names = manifest.states[f"layers.{layer_id}.table.ids"]
    return len(names[names != ABSENT].unique())


def _text(store: str, found: Sequence[Inspected]) -> str:
    columns = ("version", "committed", "sequences", "tokens", "pages", "MB", "new pages", "state, MB", "")
    rows = [
        (
            each.version,
            each.committed,
            each.sequences,
            each.tokens,
            each.pages,
            _megabytes(each.page_bytes),
            each.new_pages,
            _megabytes(each.state_bytes),
            each.verdict,
        )
        for each in found
    ]
    parts = [f"{store}: {len(found)} version{'' if len(found) == 1 else 's'}", _table(columns, rows)]
    if found and found[-1].layers:
        layers = [(layer.layer, layer.pages, _megabytes(layer.bytes)) for layer in found[-1].layers]
        parts.append(f"version {found[-1].version}: {_composed(found[-1].components)}")
        parts.append(_table(("layer", "pages", "MB"), layers))
    parts += [f"version {each.version}: {each.damage}" for each in found if each.damage]
    parts += [_losses(each) for each in found if each.lost]
    return "\n\n".join(parts)


def _composed(components: dict[str, Any]) -> str:
    """What the cache was composed of, by names and numbers."""
    shown = {name: part for name, part in components.items() if name not in ("model", "forms", "place")}
    named = {name: part["name"] if isinstance(part, dict) else part for name, part in shown.items()}
    return ", ".join(f"{name} {part}" for name, part in named.items() if part is not None)


def _losses(each: Inspected) -> str:
    lines = [f"version {each.version}: {page}" for page in each.lost[:SHOWN]]
    if len(each.lost) > SHOWN:
        lines.append(f"version {each.version}: {len(each.lost) - SHOWN} more; --json has all")
    return "missing or damaged\n" + "\n".join(lines)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
