"""PrefixIndex: the pages that a pool keeps for prompts to come, a tree of prefixes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core.fetching import Rates
from pikv.core.forms import PageForm

if TYPE_CHECKING:
    from pikv.core.pool import PagePool


@attrs.define(eq=False, kw_only=True)
class _Node:
    """One page of a prefix in all layers and KV heads, below the page before it.

    pages: by layer, their form and their ids int32 [kv_heads]. children: how many nodes continue it. used: when, by the
    index's clock, it or what continues it was last added or adopted.
    """

    key: bytes
    parent: _Node | None
    pages: dict[int, tuple[PageForm, Tensor]] = attrs.field(factory=dict)
    children: int = 0
    used: int = 0


class PrefixIndex:
    """Pages by their lineage, each held once for the index beside the caches that hold it.

    A key says what a page is of and what came before it, so keys alone make the tree: each node is found by its own.
    When the pool needs room, what has gone unused longest leaves, suffixes before prefixes. It shares the pool's lock.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._root = _Node(key=b"", parent=None)
        self._nodes: dict[bytes, _Node] = {}
        self._clock = 0
        self.rates = Rates()

    def __len__(self) -> int:
        """How many pages of prefixes are known, those of all layers and heads counting as one."""
        return len(self._nodes)

    def known(self, keys: Sequence[bytes], layer_ids: Iterable[int]) -> int:
        """How many of these keys, from the first on without a gap, have their pages in all of these layers."""
        wanted = set(layer_ids)
        for count, key in enumerate(keys):
            node = self._nodes.get(key)
            if node is None or not wanted <= node.pages.keys():
                return count
        return len(keys)

    def pages(self, keys: Sequence[bytes], layer_id: int) -> Tensor:
        """The pages of known keys in a layer, int32 [keys, kv_heads]; whoever adopts them retains them."""
        self._clock += 1
        for key in keys:
            self._nodes[key].used = self._clock
        return torch.stack([self._nodes[key].pages[layer_id][1] for key in keys])

    def add(self, keys: Sequence[bytes], layer_id: int, form: PageForm, ids: Tensor) -> None:
        """Hold the pages ids int32 [new, kv_heads] of a layer, which the last `new` of a sequence's keys are of.

        Of pages that are known already the first stay. What would follow a page that has left is not held: it could
        not be found.
        """
        with self._pool.locked():
            before = len(keys) - len(ids)
            parent = self._nodes.get(keys[before - 1]) if before else self._root
            self._clock += 1
            for key, heads in zip(keys[before:], ids, strict=True):
                if parent is None:
                    return
                parent = self._held(key, parent)
                parent.used = self._clock
                if layer_id not in parent.pages:
                    self._pool.retain(heads)
                    parent.pages[layer_id] = (form, heads.clone())

    def _held(self, key: bytes, parent: _Node) -> _Node:
        if key not in self._nodes:
            self._nodes[key] = _Node(key=key, parent=parent)
            parent.children += 1
        return self._nodes[key]

    def free(self, needed_bytes: int) -> int:
        """Let pages go until the pool has so many bytes more, or nothing is left that only the index holds.

        Returns the bytes that became free.
        """
        if needed_bytes <= 0 or not self._nodes:
            return 0
        with self._pool.locked():
            before, order = self._pool.used_bytes, {key: number for number, key in enumerate(self._nodes)}
            leaves = [(node.used, order[key], node) for key, node in self._nodes.items() if not node.children]
            heapq.heapify(leaves)
            while leaves and before - self._pool.used_bytes < needed_bytes:
                _, _, node = heapq.heappop(leaves)
                if not self._pool.freed_by(_ids(node.pages)):
                    continue  # a cache has it, and with it all that comes before
                parent = self._drop(node)
                if parent is not self._root and not parent.children:
                    heapq.heappush(leaves, (parent.used, order[parent.key], parent))
            return before - self._pool.used_bytes

    def _drop(self, node: _Node) -> _Node:
        parent = node.parent
        assert parent is not None, "the root holds no pages, so it is never dropped"
        for form, ids in node.pages.values():
            self._pool.release(form, ids)
        del self._nodes[node.key]
        parent.children -= 1
        return parent

    def clear(self) -> None:
        """Forget all prefixes; pages that no cache holds are freed."""
        with self._pool.locked():
            for node in reversed(list(self._nodes.values())):  # those that continue a prefix came after it
                self._drop(node)

    def held(self) -> Tensor:
        """The ids of all pages that the index holds: int32 [n]."""
        nothing = torch.empty(0, dtype=torch.int32)
        return torch.cat([nothing, *(_ids(node.pages) for node in self._nodes.values())])


def _ids(pages: Mapping[int, tuple[PageForm, Tensor]]) -> Tensor:
    return torch.cat([ids for _, ids in pages.values()])
