"""What every page selector must do: derive from this, say how yours is made, and run pytest."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv.core.config import LayerConfig
from pikv.core.ports import PageIndex, PageSelector

LAYER = LayerConfig(query_heads=6, kv_heads=2, key_dim=16, value_dim=8)
PAGES, PAGE_SIZE, SEQUENCES = 7, 16, 3


class PageSelectorConformance:
    """The suite. `make` returns the selector under test."""

    def make(self) -> PageSelector:
        """The selector under test."""
        raise TypeError(f"{type(self).__name__} must define make(), which returns the page selector under test")

    def indexed(self, keys: Tensor) -> Tensor:
        """The index of keys [..., page_size, key_dim], as the cache makes it: [..., *shape]."""
        selector = self.make()
        form = selector.index_form(LAYER)
        flat = keys.flatten(0, -3)
        out = torch.full((len(flat), *form.shape), torch.nan).to(form.dtype)
        selector.index(flat, out)
        return out.unflatten(0, keys.shape[:-2])

    def random(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Keys [sequences, kv_heads, pages, page_size, key_dim] and queries [sequences, kv_heads, group, key_dim]."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(SEQUENCES, LAYER.kv_heads, PAGES, PAGE_SIZE, LAYER.key_dim, generator=generator)
        return keys, torch.randn(SEQUENCES, LAYER.kv_heads, LAYER.group, LAYER.key_dim, generator=generator)

    def scored(self, keys: Tensor, query: Tensor) -> Tensor:
        """Scores of pages that are all present."""
        arrays = self.indexed(keys)
        return self.make().score(PageIndex(arrays=arrays, present=torch.ones(arrays.shape[:3]).bool()), query)

    def test_reads_at_least_a_page(self) -> None:
        """The number of pages is positive, and the number of dense layers is not negative."""
        selector = self.make()
        assert selector.pages >= 1
        assert selector.dense_layers >= 0

    def test_one_score_a_page(self) -> None:
        """There is one number for each page of each head, and no NaN."""
        scores = self.scored(*self.random())
        assert scores.shape == (SEQUENCES, LAYER.kv_heads, PAGES)
        assert not scores.isnan().any()

    def test_index_of_a_page_stands_alone(self) -> None:
        """The index of a page is the same whatever other pages are indexed with it."""
        keys, _ = self.random()
        assert torch.equal(self.indexed(keys)[1, 1, 2], self.indexed(keys[1:2, 1:2, 2:3])[0, 0, 0])

    def test_sequences_stand_alone(self) -> None:
        """The scores of a sequence do not depend on the others in the batch."""
        keys, query = self.random()
        torch.testing.assert_close(self.scored(keys, query)[1:2], self.scored(keys[1:2], query[1:2]))

    def test_changes_nothing(self) -> None:
        """Scoring writes neither to the index nor to the query, and gives the same again."""
        keys, query = self.random()
        arrays, asked = self.indexed(keys), query.clone()
        index = PageIndex(arrays=arrays.clone(), present=torch.ones(arrays.shape[:3]).bool())
        first = self.make().score(index, query)
        assert torch.equal(index.arrays, arrays)
        assert torch.equal(query, asked)
        assert torch.equal(first, self.make().score(index, query))

    def test_half_precision_queries(self) -> None:
        """A query in bfloat16 or float16 is scored too."""
        keys, query = self.random()
        for dtype in (torch.bfloat16, torch.float16):
            assert self.scored(keys.to(dtype), query.to(dtype)).shape == (SEQUENCES, LAYER.kv_heads, PAGES)
