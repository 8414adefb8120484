"""How a cache begins: it adopts the known pages of its prompts' longest known prefixes."""

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
from pikv.core.layer import NEVER, LayerCache
from pikv.core.lineage import KnownTokens, Lineage, reads_with_loss, root_key
from pikv.core.pool import PagePool
from pikv.core.ports.backend import PageCodec
from pikv.core.runtime import RuntimeConfig
from pikv.core.serving import Served
from pikv.core.stored_pages import StoredPages
from pikv.core.tables import all_live, new_pages


@attrs.frozen(kw_only=True)
class Prompts:
    """What a cache is told before its first update; see PiKVCache.begin. tokens: of each sequence, without padding."""

    tokens: list[array[int]]
    chunk_tokens: int | None
    weights: str

    @classmethod
    def of(cls, token_ids: Tensor, *, chunk_tokens: int | None, weights: str) -> Prompts:
        """Checked: InputError."""
        if token_ids.dim() != 2 or not len(token_ids):
            raise InputError(f"token_ids must be [batch, tokens] of at least one sequence, got {list(token_ids.shape)}")
        if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
            raise InputError(f"token_ids must be whole numbers, got {token_ids.dtype}; give what the tokenizer gave")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise InputError(f"chunk_tokens must be a positive number of tokens or None, got {chunk_tokens}")
        tokens = [array("q", [token for token in row if token >= 0]) for row in token_ids.tolist()]
        return cls(tokens=tokens, chunk_tokens=chunk_tokens, weights=weights)


def begin(
    model: ModelConfig, runtime: RuntimeConfig, pool: PagePool, served: Sequence[Served], prompts: Prompts
) -> tuple[Lineage, dict[int, LayerCache]]:
    """The lineage of these prompts, and the layers that hold what is known of them: none if nothing is."""
    root, loss = root_key(model, runtime, prompts.weights), reads_with_loss(runtime)
    known = [KnownTokens(root=root, page_size=runtime.page_size, tokens=tokens) for tokens in prompts.tokens]
    stored = _stored(runtime, pool, served, prompts.weights)
    held: dict[int, LayerCache] = {}
    for each in known:
        each.updates = _updates(len(each.tokens), prompts.chunk_tokens, runtime) if loss else set()
        each.keys_of(max(0, len(each.tokens) - runtime.tail_tokens) // runtime.page_size)
        each.updates = set()  # the keys say them already
        if stored is not None:
            stored.fetch(each.keys)
    with pool.locked():
        for each in known:
            del each.keys[pool.prefixes.known(each.keys, len(served)) :]
            each.shown = dict.fromkeys(range(len(served)), len(each.keys))
        if any(each.keys for each in known):
            makers = {i: functools.partial(_adopted, i, of.codec, pool, known) for i, of in enumerate(served)}
            layers.replace(held, makers)
    return Lineage(index=pool.prefixes, stored=stored, notes_updates=loss, sequences=known), held


def _stored(runtime: RuntimeConfig, pool: PagePool, served: Sequence[Served], weights: str) -> StoredPages | None:
    if runtime.prefix_store is None:
        return None
    if not weights:
        raise InputError(
            "weights must name the model's weights where a prefix_store is shared: other processes may have others of "
            "the same config"
        )
    return StoredPages(store=runtime.prefix_store, pool=pool, codecs=[each.codec for each in served])


def _updates(tokens: int, chunk_tokens: int | None, runtime: RuntimeConfig) -> set[tuple[int, int]]:
    """Where the updates of a prompt would begin, and what would be sealed by then, if nothing were adopted."""
    starts = range(0, tokens, chunk_tokens or max(1, tokens))
    return {(start, max(0, start - runtime.tail_tokens) // runtime.page_size) for start in starts}


def _adopted(layer_id: int, codec: PageCodec, pool: PagePool, known: Sequence[KnownTokens]) -> LayerCache:
    """A layer that holds the pages of the known keys, as if their tokens had come, and been settled."""
    config, page_size = codec.layer, codec.form.page_size
    nothing = torch.empty(len(known), config.kv_heads, 0, config.key_dim, dtype=codec.dtype, device=pool.device)
    layer = LayerCache.empty(layer_id, codec, pool, nothing)
    pages = torch.tensor([len(each.keys) for each in known])
    counts = pages[:, None].repeat(1, config.kv_heads)
    ids = torch.full((int(pages.max()), len(known), config.kv_heads), NEVER, dtype=torch.int32)
    for sequence, each in enumerate(known):
        if each.keys:
            ids[: len(each.keys), sequence] = pool.prefixes.pages(each.keys, layer_id)
    page, sequence_of, head = new_pages(counts)
    held = ids[page, sequence_of, head]
    layer.add_pages(held, (page + 1) * page_size - 1, counts, live=all_live(page_size))
    layer.last, layer.seen = pages * page_size - 1, pages * page_size
    layer.first = layer.first.masked_fill(pages > 0, 0)
    pool.retain(held)  # last: what raises before it holds nothing
    return layer
