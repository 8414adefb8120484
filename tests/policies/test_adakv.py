"""Budgets that differ between the heads of a layer by their scores, and the memory that they free."""

from __future__ import annotations

import attrs
import pytest
import torch

import pikv
from pikv import ConfigError
from pikv.core.ports import QueryTokenSelector, TokenSelector
from pikv.core.views import AllocationRequest
from pikv.policies import AdaKV, Importance, Pyramid, Recent, Uniform
from pikv.testing.allocator import AllocatorConformance

pytestmark = pytest.mark.property
MODEL = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=2, head_dim=8)
SETTINGS = {"page_size": 16, "tail_tokens": 16, "budget_tokens": 16 + 4 * 16}


@attrs.frozen(kw_only=True)
class ByValue(TokenSelector):
    """A token's score is its value's first number, so a test says what stays."""

    sinks: int = 0
    recent: int = 4

    def score(self, view):
        return view.values[..., 0]


@attrs.frozen(kw_only=True)
class Windowed(QueryTokenSelector):
    """The same; it must be shown no more queries than it asks for."""

    window: int = 2
    sinks: int = 0
    recent: int = 0

    def score(self, view):
        assert view.queries.shape[2] == self.window
        assert view.asked.tolist() == [[int(view.positions.max()) - 1, int(view.positions.max())]]
        return view.values[..., 0]


def request(*, budget: int, floor: int = 0, ceiling: int = 100) -> AllocationRequest:
    """One layer of two heads, pages of 16 tokens."""
    shape = (1, 1, 2)
    return AllocationRequest(
        budget_pages=torch.tensor([budget]),
        floor=torch.full(shape, floor),
        ceiling=torch.full(shape, ceiling),
        page_size=16,
    )


class TestAdaKV(AllocatorConformance):
    def make(self) -> AdaKV:
        return AdaKV()

    def test_by_hand(self):
        """Of the 128 best tokens head 0 has 96: 0.5 * (96, 32) + 0.5 * (64, 64) = (80, 48) tokens = (5, 3) pages."""
        scores = torch.zeros(1, 2, 200)
        scores[0, 0, :96], scores[0, 1, 100:132] = 2, 1
        assert AdaKV(safeguard=0.5).heads(request(budget=8), 0, torch.tensor([8]), scores).tolist() == [[5, 3]]

    def test_the_safeguard_is_for_heads_without_a_good_token(self):
        """With a = 0.2 the worse of two heads keeps a tenth of the layer."""
        scores = torch.tensor([[[9.0] * 400, [0.0] * 400]])
        assert AdaKV(safeguard=0.2).heads(request(budget=20), 0, torch.tensor([20]), scores).tolist() == [[18, 2]]

    def test_what_does_not_compete_is_not_counted(self):
        """Empty slots and protected tokens are at -inf."""
        scores = torch.full((1, 2, 100), -torch.inf)
        scores[0, 0, :8], scores[0, 1, :24] = 1, 0
        assert AdaKV(safeguard=1e-9).heads(request(budget=4), 0, torch.tensor([4]), scores).tolist() == [[1, 3]]

    @pytest.mark.parametrize("safeguard", [0, -0.5, 1.5, float("nan")])
    def test_a_safeguard_is_a_share(self, safeguard):
        """Without any, a head could be left with nothing."""
        with pytest.raises(ConfigError, match="safeguard"):
            AdaKV(safeguard=safeguard)

    def test_layers_share_as_told(self):
        """Ada-PyramidKV is AdaKV across a pyramid."""
        shape = (1, 4, 2)
        asked = AllocationRequest(
            budget_pages=torch.tensor([40]),
            floor=torch.zeros(shape, dtype=torch.int64),
            ceiling=torch.full(shape, 50),
            page_size=16,
        )
        assert torch.equal(AdaKV(across=Pyramid()).layers(asked), Pyramid().layers(asked))


def prompt(cache: pikv.PiKVCache, good: tuple[int, int], *, tokens: int = 400, batch: int = 1) -> None:
    """A prompt in chunks of 100, in which head h has good[h] tokens of score 1, evenly spread, and else of score 0."""
    values = torch.zeros(batch, 2, tokens, 8)
    for head, count in enumerate(good):
        values[:, head, torch.linspace(0, tokens - 20, count).long()] = 1
    states = torch.zeros(batch, 2, tokens, 8)
    for first in range(0, tokens, 100):
        span = slice(first, first + 100)
        cache.update(0, first, states[:, :, span], values[:, :, span])
        cache.attend(0, states[:, :, span])


def rows(cache: pikv.PiKVCache, sequence: int = 0) -> list[int]:
    return cache.retrieve(0).mask[sequence].sum(-1).tolist()


def test_memory_is_ragged():
    """The better head keeps more, and what both hold is what the budget says, in bytes: nothing is masked."""
    adaptive = pikv.compose(MODEL, allocator=AdaKV(), token_selector=ByValue(), **SETTINGS)
    even = pikv.compose(MODEL, allocator=Uniform(), token_selector=ByValue(), **SETTINGS)
    for cache in (adaptive, even):
        prompt(cache, (120, 8))
        cache.finish_prefill()
    assert rows(even) == [80, 80]
    assert rows(adaptive) == [16 + 7 * 16, 16 + 16]
    assert adaptive.stored_bytes().pages == even.stored_bytes().pages == 8 * 1088
    held = adaptive.retrieve(0)
    assert int(held.values[0, 0, :, 0].sum()) == 120  # every good one, among 128 tokens
    assert int(held.values[0, 1, :, 0].sum()) == 8


def test_bytes_fall_with_the_budget():
    """Half the pages are half the bytes of pages, whichever heads have them."""
    stored = []
    for pages in (2, 4, 8):
        settings = {**SETTINGS, "budget_tokens": 16 + pages * 16}
        cache = pikv.compose(MODEL, allocator=AdaKV(), token_selector=ByValue(), **settings)
        prompt(cache, (120, 8))
        cache.finish_prefill()
        stored.append(cache.stored_bytes().pages)
    assert stored == [2 * 2 * 1088, 2 * 4 * 1088, 2 * 8 * 1088]


def test_the_split_holds_while_decoding():
    """Later scores do not move it: pages that a head gave up would not come back."""
    cache = pikv.compose(MODEL, allocator=AdaKV(), token_selector=ByValue(), **SETTINGS)
    prompt(cache, (120, 8))
    states = torch.zeros(1, 2, 1, 8)
    best = torch.tensor([0.0, 5.0]).view(1, 2, 1, 1).expand(-1, -1, -1, 8)  # now head 1 has the better tokens
    for position in range(400, 500):
        cache.update(0, position, states, best)
        cache.attend(0, states)
        assert rows(cache)[0] <= 128
        assert rows(cache)[1] <= 32
    prompt_after = torch.zeros(1, 2, 100, 8)
    cache.update(0, 500, prompt_after, best.expand(-1, -1, 100, -1))
    cache.attend(0, prompt_after)
    assert rows(cache)[1] > rows(cache)[0]  # another prompt is split anew


def test_a_split_is_made_when_decoding_first_meets_the_budget():
    """A short prompt evicts nothing; the first decoded token too many is split by the scores of then."""
    cache = pikv.compose(MODEL, allocator=AdaKV(), token_selector=ByValue(), **SETTINGS)
    prompt(cache, (60, 0), tokens=100)
    states = torch.zeros(1, 2, 1, 8)
    for position in range(100, 140):
        cache.update(0, position, states, states)
        cache.attend(0, states)
    assert rows(cache)[0] > rows(cache)[1]
    assert sum(rows(cache)) <= 160


def test_a_split_goes_with_its_sequence():
    """After a reorder each sequence keeps to the split that its own scores made."""
    cache = pikv.compose(MODEL, allocator=AdaKV(), token_selector=ByValue(), **SETTINGS)
    values = torch.zeros(2, 2, 200, 8)
    values[0, 0], values[1, 1] = 1, 1
    states = torch.zeros(2, 2, 200, 8)
    cache.update(0, 0, states, values)
    cache.attend(0, states)
    cache.reorder([1, 0])
    for position in range(200, 260):
        cache.update(0, position, states[:, :, :1], values[:, :, :1])
        cache.attend(0, states[:, :, :1])
    assert rows(cache, 0)[1] > rows(cache, 0)[0]
    assert rows(cache, 1)[0] > rows(cache, 1)[1]


@pytest.mark.parametrize("own", [Recent(recent=4), Importance(window=8, recent=4)])
def test_the_score_of_one_and_the_split_of_another(own):
    """Which tokens stay is the selector's word, how many in each head that of `scored_by`, shown its own window."""
    cache = pikv.compose(MODEL, allocator=AdaKV(scored_by=Windowed()), token_selector=own, **SETTINGS)
    prompt(cache, (120, 8))
    cache.finish_prefill()
    assert rows(cache)[0] > rows(cache)[1]
    if isinstance(own, Recent):
        kept = cache.retrieve(0).positions[0, 1][:32].tolist()
        assert kept == [0, 1, 2, 3, *range(372, 400)]


def test_a_split_by_queries_needs_attend():
    """A host that does not attend is told so, and nothing has changed."""
    cache = pikv.compose(MODEL, allocator=AdaKV(scored_by=Windowed()), token_selector=ByValue(), **SETTINGS)
    states = torch.zeros(1, 2, 200, 8)
    cache.update(0, 0, states, states)
    with pytest.raises(pikv.StateError, match="Windowed scores tokens by the queries"):
        cache.update(0, 200, states, states)
    assert rows(cache) == [200, 200]


def test_parts_of_parts_have_names_too():
    """As files and command lines have them."""
    names = {
        "allocator": {"name": "adakv", "across": "pyramid", "scored_by": {"name": "importance", "window": 8}},
        "token_selector": "recent",
        "budget_tokens": 256,
    }
    allocator = AdaKV(across=Pyramid(), scored_by=Importance(window=8))
    assert pikv.runtime_from(names, MODEL).allocator == allocator
