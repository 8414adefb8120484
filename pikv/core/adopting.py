"""How a cache begins: it adopts the known pages of its prompts' longest known prefixes, or is promised them."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from pikv.core import layers
from pikv.core.config import ModelConfig
from pikv.core.errors import InputError
from pikv.core.fetching import Stopwatch
from pikv.core.layer import LayerCache
from pikv.core.lineage import KnownTokens, Lineage, reads_with_loss, root_key
from pikv.core.pool import PagePool
from pikv.core.promised import Promised
from pikv.core.runtime import RuntimeConfig
from pikv.core.serving import Served
from pikv.core.stored_pages import StoredPages


@attrs.frozen(kw_only=True)
class Prompts:
    """What a cache is told before its first update; see PiKVCache.begin. tokens: of each sequence, without padding."""

    tokens: list[array[int]]
    chunk_tokens: int | None
    weights: str
    wait_s: float | None

    @classmethod
    def of(cls, token_ids: Tensor, *, chunk_tokens: int | None, weights: str, wait_s: float | None) -> Prompts:
        """Checked: InputError."""
        if token_ids.dim() != 2 or not len(token_ids):
            raise InputError(f"token_ids must be [batch, tokens] of at least one sequence, got {list(token_ids.shape)}")
        if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
            raise InputError(f"token_ids must be whole numbers, got {token_ids.dtype}; give what the tokenizer gave")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise InputError(f"chunk_tokens must be a positive number of tokens or None, got {chunk_tokens}")
        if wait_s is not None and not wait_s >= 0:
            raise InputError(f"wait_s must be seconds from 0 on, or None to wait for nothing, got {wait_s}")
        tokens = [array("q", [token for token in row if token >= 0]) for row in token_ids.tolist()]
        return cls(tokens=tokens, chunk_tokens=chunk_tokens, weights=weights, wait_s=wait_s)


@attrs.frozen(kw_only=True, eq=False)
class Begun:
    """A cache's beginning. layers: that hold what is known: none if nothing is, and none while it is promised."""

    lineage: Lineage
    layers: dict[int, LayerCache] = attrs.field(factory=dict)
    promised: Promised | None = None


def begin(
    model: ModelConfig, runtime: RuntimeConfig, pool: PagePool, served: Sequence[Served], prompts: Prompts
) -> Begun:
    """Adopt what is known of these prompts now, or promise what another process is writing."""
    loss, stored = reads_with_loss(runtime), _stored(runtime, pool, served, prompts)
    known = _announced(model, runtime, prompts, loss=loss)
    lineage = Lineage(index=pool.prefixes, stored=stored, notes_updates=loss, sequences=known)
    if stored is not None and prompts.wait_s is not None:
        for each in known:
            each.shown = dict.fromkeys(range(len(served)), len(each.keys))
        return Begun(lineage=lineage, promised=Promised(stored=stored, sequences=known, wait_s=prompts.wait_s))
    if stored is not None:
        lineage.stopwatch = Stopwatch(pool.prefixes.rates)
        for each in known:
            stored.fetch(each.keys)
    held: dict[int, LayerCache] = {}
    with pool.locked():
        for each in known:
            del each.keys[pool.prefixes.known(each.keys, range(len(served))) :]
            each.shown = dict.fromkeys(range(len(served)), len(each.keys))
        if any(each.keys for each in known):
            makers = {i: functools.partial(layers.adopted, i, of.codec, pool, known) for i, of in enumerate(served)}
            layers.replace(held, makers)
    return Begun(lineage=lineage, layers=held)


def _announced(model: ModelConfig, runtime: RuntimeConfig, prompts: Prompts, *, loss: bool) -> list[KnownTokens]:
    """The tokens of the sequences, with the keys of all pages that they will have sealed by the prompts' end."""
    root = root_key(model, runtime, prompts.weights)
    known = [KnownTokens(root=root, page_size=runtime.page_size, tokens=tokens) for tokens in prompts.tokens]
    for each in known:
        each.updates = _updates(len(each.tokens), prompts.chunk_tokens, runtime) if loss else set()
        each.keys_of(max(0, len(each.tokens) - runtime.tail_tokens) // runtime.page_size)
        each.updates = set()  # the keys say them already
    return known


def _stored(runtime: RuntimeConfig, pool: PagePool, served: Sequence[Served], prompts: Prompts) -> StoredPages | None:
    if runtime.prefix_store is None:
        if prompts.wait_s is not None:
            raise InputError(
                "wait_s is for pages that another process writes to a prefix_store; compose one, or leave it out"
            )
        return None
    if not prompts.weights:
        raise InputError(
            "weights must name the model's weights where a prefix_store is shared: other processes may have others of "
            "the same config"
        )
    codecs = [each.codec for each in served]
    return StoredPages(store=runtime.prefix_store, fetching=runtime.fetching, pool=pool, codecs=codecs)


def _updates(tokens: int, chunk_tokens: int | None, runtime: RuntimeConfig) -> set[tuple[int, int]]:
    """Where the updates of a prompt would begin, and what would be sealed by then, if nothing were adopted."""
    starts = range(0, tokens, chunk_tokens or max(1, tokens))
    return {(start, max(0, start - runtime.tail_tokens) // runtime.page_size) for start in starts}
