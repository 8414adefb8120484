"""Lineage: what the pages of a sequence are of, as a chain of keys. Pages with the same key may be shared.

A page's key is a hash of the key before it and of its own tokens; the first one's, of the composition. Where what a
page holds depends on how the prompt came, since earlier tokens were read with a loss, its key says that too.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence

import attrs
import torch
from torch import Tensor

from pikv.core.components import composition
from pikv.core.config import ModelConfig
from pikv.core.exact import Exact, Refuse
from pikv.core.fetching import Stopwatch
from pikv.core.layer import LayerCache
from pikv.core.ports.compressor import BasisCompressor, Compressor
from pikv.core.prefix_index import PrefixIndex
from pikv.core.runtime import RuntimeConfig
from pikv.core.stored_pages import StoredPages

FORMAT = 1  # of keys: another one whenever what they are made of changes


def why_unshared(model: ModelConfig, runtime: RuntimeConfig) -> str | None:
    """Why this composition's pages are of more than the tokens up to them, so that none is shared; None if shared."""
    windows = [layer_id for layer_id, layer in enumerate(model.layers) if layer.window is not None]
    bases = [part for part in _compressors(runtime) if isinstance(part, BasisCompressor)]
    plain = [part for part in (*_compressors(runtime), runtime.page_selector) if part and not attrs.has(type(part))]
    reasons = {
        f"budget_tokens={runtime.budget_tokens}: what leaves depends on the tokens and queries that come later": (
            runtime.budget_tokens is not None
        ),
        f"{type(runtime.when_full).__name__} lets pages of a sequence leave when the pool is full": (
            not isinstance(runtime.when_full, Refuse)
        ),
        f"{_named(bases)}: pages in a basis that belongs to the sequence": bool(bases),
        f"layers {windows} have a sliding window, which old pages leave": bool(windows),
        "the tokens of a sequence are stored by several ranks": runtime.transport is not None,
        f"{_named(plain)}: settings can be compared of attrs classes only": bool(plain),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _compressors(runtime: RuntimeConfig) -> tuple[Compressor, ...]:
    """The page formats, one for all layers or one for each."""
    return (runtime.compressor,) if isinstance(runtime.compressor, Compressor) else runtime.compressor


def _named(parts: Iterable[object]) -> str:
    return ", ".join(sorted({type(part).__name__ for part in parts}))


def root_key(model: ModelConfig, runtime: RuntimeConfig, weights: str) -> bytes:
    """The key before the first page: the model, every component with its settings, and who computes."""
    backends = [backend.name for backend in runtime.backends]
    said = [FORMAT, weights, composition(model, runtime), backends]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def reads_with_loss(runtime: RuntimeConfig) -> bool:
    """Whether a token sees sealed pages otherwise than the tail, so that it matters when pages were sealed."""
    return any(not isinstance(part, Exact) for part in _compressors(runtime)) or runtime.page_selector is not None


@attrs.define(kw_only=True)
class KnownTokens:
    """The tokens of one sequence, as far as they are known, and the keys of its pages.

    updates: where the sequence's updates began, each with the pages that were sealed then; empty where that does not
    matter. shown: by layer, how many pages the index has been shown.
    """

    root: bytes
    page_size: int
    tokens: array[int]
    keys: list[bytes] = attrs.field(factory=list)
    updates: set[tuple[int, int]] = attrs.field(factory=set)
    shown: dict[int, int] = attrs.field(factory=dict)

    @property
    def pages(self) -> int:
        """How many full pages the known tokens make."""
        return len(self.tokens) // self.page_size

    def keys_of(self, pages: int) -> list[bytes]:
        """The keys of the first pages, whose tokens must all have come."""
        for page in range(len(self.keys), pages):
            span = range(page * self.page_size, (page + 1) * self.page_size)
            digest = hashlib.sha256(self.keys[-1] if self.keys else self.root)
            digest.update(self.tokens[span.start : span.stop].tobytes())
            digest.update(repr(sorted(update for update in self.updates if update[0] in span)).encode())
            self.keys.append(digest.digest())
        return self.keys[:pages]

    def copy(self) -> KnownTokens:
        """The same, to go on differently."""
        return attrs.evolve(self, keys=self.keys.copy(), updates=self.updates.copy(), shown=self.shown.copy())

    def crop(self, end: int) -> None:
        """Know nothing of the tokens from position `end` on, which may be others now."""
        self.tokens = self.tokens[:end]
        del self.keys[self.pages :]
        self.shown = {layer_id: min(pages, self.pages) for layer_id, pages in self.shown.items()}


@attrs.define(kw_only=True)
class Lineage:
    """The lineage of a cache's sequences. notes_updates: whether keys say how the prompt came.

    stored: where other processes find what is sealed, and it is looked for; None without a store. stopwatch: of what
    the model computes, where that is compared with fetching.
    """

    index: PrefixIndex
    stored: StoredPages | None
    notes_updates: bool
    sequences: list[KnownTokens]
    stopwatch: Stopwatch | None = None

    def covered(self) -> Tensor:
        """How many tokens the pages are of whose keys are known, just after begin the adopted ones: int64 [n]."""
        return torch.tensor([len(known.keys) * known.page_size for known in self.sequences])

    def note(self, layer: LayerCache) -> None:
        """Note where an update of a layer begins, before its tokens are appended."""
        if self.stopwatch is not None:
            self.stopwatch.update(layer)
        if self.notes_updates:
            starts, sealed = (layer.last + 1).tolist(), layer.table.counts.amin(-1).tolist()
            for known, start, pages in zip(self.sequences, starts, sealed, strict=True):
                if start < len(known.tokens):
                    known.updates.add((start, pages))

    def show(self, layers: Iterable[LayerCache]) -> None:
        """Show the index, and the store, what these layers have sealed of known tokens."""
        for layer in layers:
            for sequence, known in enumerate(self.sequences):
                self._show(layer, sequence, known)

    def _show(self, layer: LayerCache, sequence: int, known: KnownTokens) -> None:
        first = known.shown.get(layer.layer_id, 0)
        pages = min(int(layer.table.counts[sequence].min()), known.pages)
        if pages <= first:
            return
        last_tokens = torch.arange(first + 1, pages + 1) * known.page_size - 1
        if not bool((layer.table.newest[sequence, :, first:pages] == last_tokens).all()):
            known.crop(0)  # positions jumped, so the tokens are not those that were announced
            return
        keys, ids = known.keys_of(pages), layer.table.ids[sequence, :, first:pages].T
        self.index.add(keys, layer.layer_id, layer.codec.form, ids)
        if self.stored is not None:
            self.stored.write(keys[first:], layer.layer_id, ids)
        known.shown[layer.layer_id] = pages

    def select(self, index: Tensor) -> Lineage:
        """The lineage of the sequences at index int64 [n]."""
        return attrs.evolve(self, sequences=[self.sequences[i].copy() for i in index.tolist()])

    def copy(self) -> Lineage:
        """The same, to go on differently."""
        return attrs.evolve(self, sequences=[known.copy() for known in self.sequences])

    @classmethod
    def joined(cls, parts: Sequence[tuple[Lineage | None, int]]) -> Lineage | None:
        """One lineage of the sequences of several, each with their number; of those without one nothing is known."""
        first = next((lineage for lineage, _ in parts if lineage is not None), None)
        if first is None:
            return None
        page_size = first.sequences[0].page_size
        sequences: list[KnownTokens] = []
        for lineage, count in parts:
            nothing = [KnownTokens(root=b"", page_size=page_size, tokens=array("q")) for _ in range(count)]
            sequences += nothing if lineage is None else lineage.copy().sequences
        return attrs.evolve(first, sequences=sequences)

    def crop(self, ends: Tensor) -> None:
        """Know nothing of the tokens from these positions on, int64 [sequences]."""
        for known, end in zip(self.sequences, ends.tolist(), strict=True):
            known.crop(end)
