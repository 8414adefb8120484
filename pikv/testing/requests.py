"""What the suites of policies ask: hypothesis strategies for allocation requests, stored tokens and routing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from pikv.core.config import LayerConfig
from pikv.core.ports import Observation
from pikv.core.rotary import Rotary
from pikv.core.runtime import PAGE_SIZES
from pikv.core.views import AllocationRequest, TokenView


def whole_numbers(shape: tuple[int, ...], least: int, most: int) -> st.SearchStrategy[Tensor]:
    """int64 tensors of numbers from least to most."""
    size = math.prod(shape)
    lists = st.lists(st.integers(least, most), min_size=size, max_size=size)
    return lists.map(lambda numbers: torch.tensor(numbers, dtype=torch.int64).reshape(shape))


@st.composite
def allocation_requests(draw: st.DrawFn) -> AllocationRequest:
    """Any limits of any rows, layers with fewer heads than others, budgets below all floors and above all ceilings."""
    sequences, layers, widest = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    shape = (sequences, layers, widest)
    heads = draw(whole_numbers((layers, 1), 1, widest))
    exists = torch.arange(widest) < heads
    floor = draw(whole_numbers(shape, 0, 3)) * exists
    ceiling = floor + draw(whole_numbers(shape, 0, draw(st.sampled_from((0, 2, 10, 1 << 24))))) * exists
    budget = draw(whole_numbers((sequences,), 0, int(ceiling.sum((1, 2)).max()) + 5))
    return AllocationRequest(
        budget_pages=budget, floor=floor, ceiling=ceiling, page_size=draw(st.sampled_from(PAGE_SIZES))
    )


@attrs.frozen(kw_only=True)
class StoredTokens:
    """The tensors that a TokenView is made of; see there."""

    layer: LayerConfig
    positions: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor
    asked: Tensor
    attended: Tensor = attrs.field(
        default=attrs.Factory(lambda self: torch.zeros(self.positions.shape), takes_self=True)
    )

    @property
    def present(self) -> Tensor:
        """Where there is a token: bool [sequences, kv_heads, tokens]."""
        return self.positions >= 0

    def sequence(self, number: int) -> StoredTokens:
        """One of the sequences, alone."""
        return self._each(lambda states: states[number : number + 1])

    def copied(self) -> StoredTokens:
        """The same tokens in storages of their own."""
        return self._each(Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> StoredTokens:
        changed: dict[str, Any] = {name: change(states) for name, states in self.tensors().items()}
        return attrs.evolve(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        names = ("positions", "keys", "values", "queries", "asked", "attended")
        return {name: getattr(self, name) for name in names}

    def view(self) -> TokenView:
        """What a selector is shown."""
        return TokenView(
            layer_id=0,
            layer=self.layer,
            positions=self.positions,
            queries=self.queries,
            asked=self.asked,
            attended=self.attended,
            decode=lambda: (self.keys, self.values),
        )


@st.composite
def stored_tokens(draw: st.DrawFn, window: int) -> StoredTokens:
    """Rows of 0 to 9 tokens with gaps, other ones in each head, and their sequences' newest `window` queries."""
    sequences, kv_heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 9))
    layer = LayerConfig(
        query_heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        key_dim=8,
        value_dim=draw(st.sampled_from((4, 8))),
        rotary=Rotary.of(dim=8),
    )
    shape = (sequences, kv_heads, tokens)
    steps = draw(whole_numbers(shape, 1, 3))
    present = draw(whole_numbers(shape, 0, draw(st.integers(0, 2)))) == 0  # all, half of them or one in three
    first = present.logical_not().int().sort(dim=-1, stable=True).indices  # rows are filled from their start on
    positions = (steps.cumsum(-1) - 1).masked_fill(~present, -1).int().gather(-1, first)
    last = positions.flatten(1).amax(1) if tokens else torch.full((sequences,), -1)
    asked = (last[:, None] - torch.arange(window).flip(0)).clamp(min=-1).long()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def states(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return StoredTokens(
        layer=layer,
        positions=positions,
        keys=states(*shape, layer.key_dim),
        values=states(*shape, layer.value_dim),
        queries=states(sequences, layer.query_heads, window, layer.key_dim),
        asked=asked,
        attended=torch.rand(shape, generator=generator).masked_fill(positions < 0, 0.0),
    )


@attrs.frozen(kw_only=True)
class RoutingCase:
    """What a router is asked: k experts for each token, after what it has observed, oldest first."""

    places: Tensor
    probabilities: Tensor
    k: int
    observed: list[Observation]


@st.composite
def routing_cases(draw: st.DrawFn) -> RoutingCase:
    """Up to 8 experts on up to 4 places, not all of which have some; probabilities with ties and zeros."""
    experts, tokens = draw(st.integers(1, 8)), draw(st.integers(0, 4))
    parts = draw(whole_numbers((tokens, experts), 0, 4))
    parts = torch.where(parts.sum(-1, keepdim=True) == 0, 1, parts).to(
        draw(st.sampled_from((torch.float32, torch.float64)))
    )
    return RoutingCase(
        places=draw(whole_numbers((experts,), 0, 3)),
        probabilities=parts / parts.sum(-1, keepdim=True),
        k=draw(st.integers(1, experts)),
        observed=draw(st.lists(observations(experts), max_size=3)),
    )


@st.composite
def observations(draw: st.DrawFn, experts: int = 0) -> Observation:
    """Some of 4 places computed something, and somebody counted for these experts, or nobody did."""
    milliseconds = draw(whole_numbers((4,), 0, 5000))
    counted = experts * draw(st.integers(0, 1))
    return Observation(
        tokens=draw(whole_numbers((4,), 0, 3)),
        seconds=milliseconds.double() / 1e3,
        load=draw(whole_numbers((counted,), 0, 3)),
        misses=draw(whole_numbers((counted,), 0, 3)),
    )


@st.composite
def sealed_pages(draw: st.DrawFn) -> Tensor:
    """The newest position in each page of rows of different lengths: int64 [sequences, kv_heads, pages]."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 5)))
    newest = draw(whole_numbers(shape, 1, 3)).cumsum(-1)
    lengths = draw(whole_numbers(shape[:2], 0, shape[2]))
    return newest.masked_fill(torch.arange(shape[2]) >= lengths[..., None], -1)
