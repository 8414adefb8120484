"""Importance: what is kept equals a slow reference that recomputes I_t from its formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.policies import Importance

WINDOW, SINKS, RECENT, PAGE_SIZE, TAIL_TOKENS = 6, 3, 5, 16, 20
MODEL = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8)


class Reference:
    """One sequence and KV head as plain lists: sealed pages, then a tail, of positions."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.pages: list[list[int]] = []
        self.tail: list[int] = []
        self.asked: list[int] = []

    def importance(self, keys: torch.Tensor, queries: torch.Tensor) -> dict[int, float]:
        """I_t for each stored t: the sum over heads and the newest queries of a causal softmax over what is stored."""
        held = [*(t for page in self.pages for t in page), *self.tail]
        scores = dict.fromkeys(held, 0.0)
        for asked in self.asked[-WINDOW:]:
            for head in range(queries.shape[0]):
                products = {t: float(queries[head, asked] @ keys[t]) / math.sqrt(8) for t in held if t <= asked}
                total = sum(math.exp(product) for product in products.values())
                for t, product in products.items():
                    scores[t] += math.exp(product) / total
        return scores

    def evict(self, scores: dict[int, float]) -> None:
        """Leave the lowest out, a tail token alone, a page whole, until the rest fits."""
        held = [*(t for page in self.pages for t in page), *self.tail]
        protected = {t for t in held if t < SINKS} | set(held[-RECENT:])
        units = [(sum(scores[t] for t in page) / len(page), PAGE_SIZE, page) for page in self.pages]
        units += [(scores[t], 1, [t]) for t in self.tail]
        units = [(math.inf if protected & set(unit[2]) else unit[0], *unit[1:]) for unit in units]
        kept: set[int] = set()
        used = 0
        for score, weight, tokens in sorted(units, key=lambda unit: (-unit[0], -unit[2][0])):
            used += weight
            if used <= self.budget or score == math.inf:
                kept |= set(tokens)
        self.pages = [page for page in self.pages if page[0] in kept]
        self.tail = [t for t in self.tail if t in kept]

    def step(self, first: int, count: int, keys: torch.Tensor, queries: torch.Tensor, *, prompt: bool) -> None:
        """Take tokens, evict to the budget, and seal unless the prompt goes on."""
        self.tail += range(first, first + count)
        self.asked += range(first, first + count)
        self.settle(keys, queries, seal=not prompt)

    def settle(self, keys: torch.Tensor, queries: torch.Tensor, *, seal: bool) -> None:
        """Evict if over the budget; then seal."""
        if len(self.pages) * PAGE_SIZE + len(self.tail) > self.budget:
            self.evict(self.importance(keys, queries))
        while seal and len(self.tail) >= TAIL_TOKENS + PAGE_SIZE:
            self.pages.append(self.tail[:PAGE_SIZE])
            self.tail = self.tail[PAGE_SIZE:]


@pytest.mark.property
@given(
    seed=st.integers(0, 2**32),
    pages=st.integers(1, 4),
    extra=st.integers(0, PAGE_SIZE - 1),
    turns=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=6), min_size=1, max_size=2),
)
def test_kept_tokens_are_those_of_the_formula(seed: int, pages: int, extra: int, turns: list[list[int]]) -> None:
    """Over turns of prompt chunks and decoded tokens, kept tokens and attention are the reference's."""
    budget = TAIL_TOKENS + pages * PAGE_SIZE + extra
    cache = pikv.compose(
        MODEL,
        token_selector=Importance(window=WINDOW, sinks=SINKS, recent=RECENT),
        budget_tokens=budget,
        page_size=PAGE_SIZE,
        tail_tokens=TAIL_TOKENS,
    )
    generator = torch.Generator().manual_seed(seed)
    total = sum(sum(turn) for turn in turns) + 12 * len(turns)
    keys, values = torch.randn(2, 1, 2, total, 8, generator=generator)
    queries = torch.randn(1, 4, total, 8, generator=generator)
    plain = [Reference(budget) for _ in range(2)]
    position, prompt = 0, True
    for turn in turns:
        for count in [*turn, *[1] * 12]:
            span = slice(position, position + count)
            cache.update(0, position, keys[:, :, span], values[:, :, span])
            prompt = count >= PAGE_SIZE or (prompt and count > 1)  # a short update does not begin a prompt
            for head, row in enumerate(plain):
                if not prompt:
                    row.settle(keys[0, head], queries[0, 2 * head : 2 * head + 2], seal=True)
            seen = cache.retrieve(0)
            out = cache.attend(0, queries[:, :, span])
            check_attention(out, queries[:, :, span], seen, position)
            for head, row in enumerate(plain):
                row.step(position, count, keys[0, head], queries[0, 2 * head : 2 * head + 2], prompt=prompt)
            position += count
            held = cache.retrieve(0)
            for head, row in enumerate(plain):
                kept = held.positions[0, head][held.mask[0, head]].tolist()
                assert kept == [*(t for page in row.pages for t in page), *row.tail]


def check_attention(out: torch.Tensor, q: torch.Tensor, held: pikv.ContextKV, position: int) -> None:
    """Attention over what is held, in float64, within 1e-5."""
    asked = torch.arange(position, position + q.shape[2])
    scores = torch.einsum("bkgtd,bksd->bkgts", q.double().unflatten(1, (2, 2)), held.keys.double()) / math.sqrt(8)
    visible = held.mask[:, :, None, None] & (held.positions[:, :, None, None] <= asked[:, None])
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    wanted = torch.einsum("bkgts,bksd->bkgtd", weights, held.values.double()).flatten(1, 2)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=0)


def test_a_host_without_attend_is_refused() -> None:
    """Without queries there is nothing to score by: the next update says so, and the cache is as before."""
    cache = pikv.compose(MODEL, token_selector=Importance(), budget_tokens=128, page_size=16, tail_tokens=32)
    k, v = torch.randn(2, 1, 2, 200, 8)
    cache.update(0, 0, k, v)
    with pytest.raises(pikv.StateError, match="call attend"):
        cache.update(0, 200, k, v)
    assert cache.retrieve(0).keys.shape[2] == 200


def test_batches_with_padding_score_their_own_queries() -> None:
    """A padded sequence keeps the same tokens in a batch as alone."""

    def kept(rows: list[int]) -> list[list[int]]:
        cache = pikv.compose(MODEL, token_selector=Importance(), budget_tokens=64, page_size=16, tail_tokens=32)
        generator = torch.Generator().manual_seed(3)
        k, v = torch.randn(2, 2, 2, 150, 8, generator=generator)
        q = torch.randn(2, 4, 150, 8, generator=generator)
        positions = torch.arange(150).repeat(2, 1)
        positions[1] = torch.where(torch.arange(150) < 40, -1, positions[1] - 40)
        cache.update(0, positions[rows], k[rows], v[rows])
        cache.attend(0, q[rows])
        cache.finish_prefill()
        held = cache.retrieve(0)
        return [held.positions[i, 0][held.mask[i, 0]].tolist() for i in range(len(rows))]

    assert kept([0, 1]) == [kept([0])[0], kept([1])[0]]
