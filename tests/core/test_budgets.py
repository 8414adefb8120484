"""What a budget keeps: the tokens that a slow reference keeps, and attention over exactly those."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.core.ports import TokenSelector
from pikv.core.rounding import apportion
from pikv.policies import Pyramid, Recent, Uniform
from pikv.testing import plain
from pikv.testing import strategies as some


@attrs.define
class SlowRow:
    """The positions that one sequence keeps in one layer and head, by the rules as they are documented.

    Sinks and the newest `recent` tokens stay. A page weighs page_size, a tail token 1. The lowest scores leave until
    the rest fits: a tail token's score is its position, a page's the mean of its positions. What the tail holds
    beyond tail_tokens is sealed, whole pages from the oldest on, once the prompt is over.
    """

    runtime: pikv.RuntimeConfig
    pages: list[list[int]] = attrs.field(factory=list)
    tail: list[int] = attrs.field(factory=list)
    first: int | None = None
    seen: int = 0

    def append(self, positions):
        stored = [position for position in positions if position >= 0]
        if stored and self.first is None:
            self.first = stored[0]
        self.tail += stored
        self.seen += len(stored)

    def budget(self):
        """Every row gets its share in whole pages, as many as there is something to fill them with."""
        size, tail = self.runtime.page_size, self.runtime.tail_tokens
        pages, rest = divmod(self.runtime.budget_tokens - tail, size)
        needed = max(0, -(-(self.seen - tail - rest) // size))
        return tail + rest + min(pages, needed) * size

    def settle(self, *, seal):
        self.evict()
        while seal and len(self.tail) >= self.runtime.tail_tokens + self.runtime.page_size:
            size = self.runtime.page_size
            self.pages.append(self.tail[:size])
            self.tail = self.tail[size:]

    def evict(self):
        selector, size = self.runtime.token_selector, self.runtime.page_size
        units = [(sum(page) / len(page), size, tuple(page)) for page in self.pages] + [(p, 1, (p,)) for p in self.tail]
        weight = sum(unit[1] for unit in units)
        if weight <= self.budget():
            return
        held = self.held()
        kept = {p for p in held if p < self.first + selector.sinks}.union(held[len(held) - selector.recent :])
        gone = set()
        for _, size, positions in sorted(units):
            if weight > self.budget() and not kept.intersection(positions):
                weight -= size
                gone.update(positions)
        self.pages = [page for page in self.pages if page[0] not in gone]
        self.tail = [p for p in self.tail if p not in gone]

    def held(self):
        return [p for page in self.pages for p in page] + self.tail


@st.composite
def budgeted_runtimes(draw):
    """Budgets from the least that is allowed up to some pages more."""
    page_size, tail = draw(st.sampled_from([16, 32])), draw(st.integers(1, 40))
    selector = Recent(sinks=draw(st.sampled_from([0, 1, 4, 20])), recent=draw(st.integers(0, tail)))
    least = tail + -(-selector.sinks // page_size) * page_size
    return pikv.RuntimeConfig(
        token_selector=selector,
        allocator=Uniform(),
        budget_tokens=least + draw(st.integers(0, 5 * page_size)),
        page_size=page_size,
        tail_tokens=tail,
    )


@st.composite
def turns(draw):
    """Chunk sizes: turns of a prompt in chunks and an answer token by token."""
    sizes = []
    for _ in range(draw(st.integers(1, 3))):
        sizes += draw(st.lists(st.integers(0, 90), max_size=3)) + [1] * draw(st.integers(0, 40))
    return sizes


def positions_of(context):
    """The positions of each row, as lists."""
    return [
        [row[there].tolist() for row, there in zip(*sequence, strict=True)]
        for sequence in zip(context.positions, context.mask, strict=True)
    ]


@pytest.mark.property
@given(
    model=some.model_configs(windows=False, dtypes=(torch.float32,)),
    runtime=budgeted_runtimes(),
    batch=st.integers(1, 3),
    sizes=turns(),
    generator=some.generators(),
    data=st.data(),
)
def test_what_stays_equals_a_slow_reference(model, runtime, batch, sizes, generator, data):
    """Over turns and chunkings; attention is over what was kept and the new tokens, and the budget holds."""
    cache = pikv.PiKVCache(model, runtime)
    rows = [[SlowRow(runtime) for _ in range(batch)] for _ in model.layers]
    everything, last, prefilling = plain.PlainCache(model), torch.full((batch,), -1), True
    for tokens in sizes:
        positions = data.draw(some.positions(batch, tokens, after=last))
        last = torch.cat([last[:, None], positions], dim=1).amax(1)
        if tokens == 1 and prefilling:  # the prompt is over
            for row in (row for layer in rows for row in layer if row.seen):
                row.settle(seal=True)
        prefilling = tokens >= runtime.page_size or (prefilling and tokens != 1)
        for layer_id, layer in enumerate(model.layers):
            k, v, q = (
                torch.randn(batch, n, tokens, dim, generator=generator)
                for n, dim in [
                    (layer.kv_heads, layer.key_dim),
                    (layer.kv_heads, layer.value_dim),
                    (layer.query_heads, layer.key_dim),
                ]
            )
            everything.update(layer_id, positions, k, v)
            cache.update(layer_id, positions, k, v)
            for row, new in zip(rows[layer_id], positions.tolist(), strict=True):
                row.append(new)
            expected = over_exactly(everything, layer_id, rows[layer_id], q, positions)
            torch.testing.assert_close(cache.attend(layer_id, q).double(), expected, atol=1e-5, rtol=1e-5)
            for row in (row for row in rows[layer_id] if row.seen):
                row.settle(seal=not prefilling)
            held = positions_of(cache.retrieve(layer_id))
            assert held == [[row.held()] * layer.kv_heads for row in rows[layer_id]]
            assert max(len(row) for sequence in held for row in sequence) <= runtime.budget_tokens


@pytest.mark.parametrize("sinks", [0, 4, 20])
def test_every_layer_has_room_for_its_sinks(sinks):
    """Where an allocator would give a layer less than is protected there, the others get less: the mean is kept to."""
    model = pikv.ModelConfig(layers=8, query_heads=1, kv_heads=1, head_dim=4)
    selector = Recent(sinks=sinks, recent=16)
    cache = pikv.compose(
        model, token_selector=selector, allocator=Pyramid(), budget_tokens=64, page_size=16, tail_tokens=16
    )
    for position, tokens in [(0, 300), *((position, 1) for position in range(300, 340))]:
        for layer_id in range(8):
            cache.update(layer_id, position, *torch.ones(2, 1, 1, tokens, 4))
            cache.attend(layer_id, torch.ones(1, 1, tokens, 4))
        held = [set(cache.retrieve(layer_id).positions[0, 0].tolist()) for layer_id in range(8)]
        protected = {*range(sinks), *range(position + tokens - 16, position + tokens)}
        assert all(protected <= positions for positions in held)
        assert len(held[0]) > len(held[-1])
        assert sum(map(len, held)) <= 64 * 8


@attrs.frozen(kw_only=True)
class Oldest(TokenSelector):
    """The older, the higher: all that keeps the newest tokens is that they are protected."""

    sinks: int = 0
    recent: int = 0

    def score(self, view):
        return -view.positions


@pytest.mark.parametrize("recent", [0, 1, 7, 16])
def test_the_recent_window_stays_whatever_its_score(recent):
    """And no token more: the others that stay are those of the highest score."""
    model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=4)
    selector = Oldest(recent=recent)
    cache = pikv.compose(model, token_selector=selector, budget_tokens=48, page_size=16, tail_tokens=16)
    cache.update(0, 0, *torch.ones(2, 1, 1, 100, 4))
    cache.attend(0, torch.ones(1, 1, 100, 4))
    assert cache.retrieve(0).positions[0, 0].tolist() == [*range(48 - recent), *range(100 - recent, 100)]


def over_exactly(everything, layer_id, rows, q, positions):
    """Attention in float64 over the tokens of all that were ever given that the rows hold."""
    only = plain.PlainCache(everything.model, {layer_id: []})
    for held, row in zip(everything.rows[layer_id], rows, strict=True):
        there = torch.isin(held.positions, torch.tensor(row.held(), dtype=torch.int64))
        only.rows[layer_id].append(plain.PlainRow(held.positions[there], held.keys[:, there], held.values[:, there]))
    return only.attend(layer_id, q, positions)


@pytest.mark.property
@given(model=some.model_configs(max_layers=3), sizes=turns(), generator=some.generators(), data=st.data())
def test_a_mean_over_layers_is_kept_to(model, sizes, generator, data):
    """Windowed layers need less than their share; what all layers hold together is within the budget all the same."""
    runtime = data.draw(budgeted_runtimes())
    cache, start = pikv.PiKVCache(model, runtime), 0
    for tokens in sizes:
        for layer_id, layer in enumerate(model.layers):
            k = torch.randn(1, layer.kv_heads, tokens, layer.key_dim, generator=generator).to(model.dtype)
            v = torch.randn(1, layer.kv_heads, tokens, layer.value_dim, generator=generator).to(model.dtype)
            q = torch.randn(1, layer.query_heads, tokens, layer.key_dim, generator=generator).to(model.dtype)
            cache.update(layer_id, start, k, v)
            cache.attend(layer_id, q)
        start += tokens
    if start:
        held = sum(int(cache.retrieve(layer_id).mask.sum()) for layer_id in range(len(model.layers)))
        assert held <= runtime.budget_tokens * sum(layer.kv_heads for layer in model.layers)


@st.composite
def shares(draw):
    """Weights, total, floor and ceiling of a few batches of n parts."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 6))

    def numbers(low, high):
        return torch.tensor(draw(st.lists(st.integers(low, high), min_size=batch * n, max_size=batch * n))).view(
            batch, n
        )

    floor = numbers(0, 9)
    total = torch.tensor(draw(st.lists(st.integers(0, 200), min_size=batch, max_size=batch)))
    return numbers(1, 100), total, floor, floor + numbers(0, 40)


@pytest.mark.property
@given(case=shares())
def test_shares_sum_to_the_clamped_total(case):
    """Exactly, and each is between its floor and its ceiling."""
    weights, total, floor, ceiling = case
    parts = apportion(weights, total, floor, ceiling)
    assert parts.dtype == torch.int64
    assert torch.equal(parts.sum(-1), total.clamp(floor.sum(-1), ceiling.sum(-1)))
    assert bool(((floor <= parts) & (parts <= ceiling)).all())


@pytest.mark.property
@given(case=shares(), more=st.integers(1, 1000), data=st.data())
def test_a_larger_weight_never_gets_less(case, more, data):
    """Of two parts with the same limits the heavier gets as much or more; a part that grows heavier keeps its own."""
    weights, total, floor, ceiling = case
    parts = apportion(weights, total, floor, ceiling)
    part = data.draw(st.integers(0, weights.shape[1] - 1))
    heavier = weights.clone()
    heavier[:, part] += more
    assert bool((apportion(heavier, total, floor, ceiling)[:, part] >= parts[:, part]).all())
    same, alike = torch.full_like(floor, 2), torch.full_like(floor, 30)
    order = weights.argsort(-1)
    assert bool((apportion(weights, total, same, alike).gather(1, order).diff(dim=-1) >= 0).all()) or _ties(weights)


def _ties(weights):
    """Equal weights may differ by the one page that goes to the first."""
    return any(len(set(row)) < len(row) for row in weights.tolist())


@pytest.mark.parametrize(
    ("weights", "total", "limits", "expected"),
    [
        ([1, 1, 2], 8, (0, 9), [2, 2, 4]),
        ([1, 1, 1], 8, (0, 9), [3, 3, 2]),  # equal fractions: to the first
        ([1, 1, 98], 12, (0, 5), [4, 3, 5]),  # what the ceiling takes goes to the others
        ([1, 1, 98], 12, (3, 9), [3, 3, 6]),  # what the floor gives comes from the others
        ([5, 5], 100, (0, 3), [3, 3]),
        ([5, 5], 0, (2, 3), [2, 2]),
    ],
)
def test_shares_are_in_proportion(weights, total, limits, expected):
    """Within the limits, by largest remainder."""
    floor, ceiling = (torch.full((len(weights),), limit) for limit in limits)
    assert apportion(torch.tensor(weights), torch.tensor(total), floor, ceiling).tolist() == expected


def test_a_budget_that_cannot_bind_evicts_nothing():
    """Also after a crop, or with a window that has half passed a page: a page weighs whole, and may be mostly dead."""
    for window in (None, 40):
        model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=4, window=window)
        roomy = pikv.compose(
            model, token_selector=Recent(), budget_tokens=10**6 if window is None else 128, page_size=16, tail_tokens=16
        )
        free = pikv.compose(model, page_size=16, tail_tokens=16)
        generator = torch.Generator().manual_seed(0)
        steps = [(0, 200), (200, 1), *((201 + i, 1) for i in range(60))]
        for position, count in steps:
            k, v = torch.randn(2, 1, 1, count, 4, generator=generator)
            q = torch.randn(1, 2, count, 4, generator=generator)
            outputs = []
            for cache in (roomy, free):
                cache.update(0, position, k, v)
                outputs.append(cache.attend(0, q))
            torch.testing.assert_close(*outputs)
            if window is None and position == 200:
                for cache in (roomy, free):
                    cache.crop(150)
                steps[2:] = [(150 + i, 1) for i in range(60)]
        assert torch.equal(roomy.retrieve(0).mask.sum(-1), free.retrieve(0).mask.sum(-1))


def test_a_selector_is_shown_rows_without_gaps():
    """In a batch of unequal lengths, what a selector sees of a sequence is what it sees of it alone."""
    seen = []

    @attrs.frozen(kw_only=True)
    class Watching(TokenSelector):
        sinks: int = 0
        recent: int = 0

        def score(self, view):
            seen.append((view.positions.clone(), view.keys.clone()))
            return view.positions

    model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=4)
    cache = pikv.compose(model, token_selector=Watching(), budget_tokens=64, page_size=16, tail_tokens=16)
    k, v = torch.randn(2, 2, 1, 80, 4)
    positions = torch.stack([torch.arange(80), torch.where(torch.arange(80) < 30, -1, torch.arange(80) - 30)])
    cache.update(0, positions, k, v)
    cache.finish_prefill()
    for position in range(80, 100):
        cache.update(0, torch.tensor([[position], [position - 30]]), k[:, :, :1], v[:, :, :1])
        cache.attend(0, torch.zeros(2, 1, 1, 4))
    assert len(seen) > 2
    for positions, keys in seen:
        present = positions >= 0
        assert bool((present.int().diff(dim=-1) <= 0).all())
        assert keys.shape[:3] == positions.shape
