"""What every page selector must do: derive from this, say how yours is made, and run pytest."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from pikv.core.config import LayerConfig
from pikv.core.ports import MassSelector, PageIndex, PageSelector

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
        form = selector.index_form(LAYER, PAGE_SIZE)
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
        return self.make().score(_all_present(self.indexed(keys)), query)

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
        index = _all_present(arrays.clone())
        first = self.make().score(index, query)
        assert torch.equal(index.arrays, arrays)
        assert torch.equal(query, asked)
        assert torch.equal(first, self.make().score(index, query))

    def test_half_precision_queries(self) -> None:
        """A query in bfloat16 or float16 is scored too."""
        keys, query = self.random()
        for dtype in (torch.bfloat16, torch.float16):
            assert self.scored(keys.to(dtype), query.to(dtype)).shape == (SEQUENCES, LAYER.kv_heads, PAGES)


class MassSelectorConformance(PageSelectorConformance):
    """The suite for selectors that estimate the attention to each page. `make` returns the selector under test."""

    tolerance = 0.5
    """Of log masses, on the mean over pages of random keys, for queries as long as the scale makes them."""

    def make(self) -> MassSelector:
        """The selector under test."""
        raise TypeError(f"{type(self).__name__} must define make(), which returns the mass selector under test")

    def massed(self, keys: Tensor, query: Tensor) -> Tensor:
        """The log mass of pages that are all present."""
        return self.make().log_mass(_all_present(self.indexed(keys)), query)

    def test_reads_between_its_bounds(self) -> None:
        """The fewest pages are at least one and at most the most; a mass is a share."""
        selector = self.make()
        assert 1 <= selector.min_pages <= selector.pages
        assert selector.mass is None or 0 < selector.mass <= 1

    def test_estimates_the_mass(self) -> None:
        """For every query head of a group, and not for the group alone."""
        keys, query = self.random()
        query = query * LAYER.scale
        estimated = self.massed(keys, query)
        true = torch.einsum("skgd,skmpd->skgmp", query, keys).logsumexp(-1)
        assert estimated.shape == (SEQUENCES, LAYER.kv_heads, LAYER.group, PAGES)
        assert float((estimated - true).abs().mean()) <= self.tolerance

    def test_estimates_what_a_softcap_leaves(self) -> None:
        """A layer with a softcap has smaller scores, and so less mass on a page that answers the query."""
        keys, query = self.random()
        index = _all_present(self.indexed(keys))
        capped = attrs.evolve(index, layer=attrs.evolve(LAYER, softcap=0.5))
        true = (0.5 * torch.tanh(torch.einsum("skgd,skmpd->skgmp", query, keys) / 0.5)).logsumexp(-1)
        assert float((self.make().log_mass(capped, query) - true).abs().mean()) <= self.tolerance


def _all_present(arrays: Tensor) -> PageIndex:
    return PageIndex(arrays=arrays, present=torch.ones(arrays.shape[:3]).bool(), layer=LAYER)
