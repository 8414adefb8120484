from __future__ import annotations

from fractions import Fraction

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv import ConfigError
from pikv.core.ports import Allocator
from pikv.core.views import AllocationRequest
from pikv.policies import Pyramid, Recent, Uniform
from pikv.testing.allocator import AllocatorConformance

pytestmark = pytest.mark.property


def request_of(*, layers: int, kv_heads: int, budget: int, floor: int, ceiling: int) -> AllocationRequest:
    """One sequence with the same limits everywhere."""
    shape = (1, layers, kv_heads)
    return AllocationRequest(
        budget_pages=torch.tensor([budget]),
        floor=torch.full(shape, floor),
        ceiling=torch.full(shape, ceiling),
        page_size=64,
    )


@st.composite
def even_requests(draw) -> AllocationRequest:
    floor = draw(st.integers(0, 3))
    return request_of(
        layers=draw(st.integers(1, 12)),
        kv_heads=draw(st.integers(1, 4)),
        budget=draw(st.integers(0, 500)),
        floor=floor,
        ceiling=floor + draw(st.integers(0, 40)),
    )


def rounded(exact: list[Fraction]) -> list[int]:
    """Largest remainder, equal ones to the first."""
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: int(sum(exact)) - sum(shares)]:
        shares[i] += 1
    return shares


def line(layers: int, budget: int, beta: int, floor: Fraction, ceiling: Fraction) -> list[Fraction]:
    """C_i = C_1 - (i - 1) d in fractions, with C_1 and C_L as the authors have them, unless a limit holds one back."""
    mean = Fraction(budget, layers)
    last = max(mean / beta, floor)
    first = min(2 * mean - last, ceiling)
    last = 2 * mean - first
    return [first - i * (first - last) / (layers - 1) for i in range(layers)]


class TestUniform(AllocatorConformance):
    def make(self) -> Uniform:
        return Uniform()

    @given(request=even_requests())
    def test_shares_are_equal(self, request):
        """Layers differ by at most a page, and the heads of a layer too; the first ones have it."""
        layers = Uniform().layers(request)
        for shares in (layers, Uniform().heads(request, 0, layers[:, 0], None)):
            assert shares[0].tolist() == sorted(shares[0].tolist(), reverse=True)
            assert int(shares.max() - shares.min()) <= 1

    def test_heads_are_equal_across_layers(self):
        """A layer with half the heads gets half the pages: budgets are for each head."""
        request = request_of(layers=3, kv_heads=4, budget=100, floor=0, ceiling=50)
        request.ceiling[:, 1, 2:] = 0
        assert Uniform().layers(request).tolist() == [[40, 20, 40]]

    def test_what_a_layer_does_not_need_goes_to_the_others_in_equal_parts(self):
        """A layer with a short window leaves its share to all others."""
        request = request_of(layers=4, kv_heads=1, budget=40, floor=1, ceiling=100)
        request.ceiling[:, 2] = 1
        assert Uniform().layers(request).tolist() == [[13, 13, 1, 13]]


class TestPyramid(AllocatorConformance):
    def make(self) -> Pyramid:
        return Pyramid()

    @given(layers=st.integers(2, 40), budget=st.integers(0, 4000), beta=st.integers(1, 50))
    def test_without_limits_it_is_the_papers_line(self, layers, budget, beta):
        """C_1 = 2b - b / beta, C_L = b / beta and the same step between layers, to the page."""
        request = request_of(layers=layers, kv_heads=1, budget=budget, floor=0, ceiling=10_000)
        expected = rounded(line(layers, budget, beta, Fraction(0), Fraction(10_000)))
        assert Pyramid(beta=beta).layers(request)[0].tolist() == expected

    @given(
        layers=st.integers(2, 40),
        mean=st.integers(4, 40),
        floor=st.integers(0, 4),
        room=st.integers(0, 40),
        heads=st.integers(1, 3),
    )
    def test_a_limit_makes_the_line_flatter(self, layers, mean, floor, room, heads):
        """With the same limits everywhere it stays a line: the end that a limit holds is at the limit."""
        budget, ceiling = mean * layers * heads, mean + room
        request = request_of(layers=layers, kv_heads=heads, budget=budget, floor=floor, ceiling=ceiling)
        expected = rounded(line(layers, budget, 20, Fraction(floor * heads), Fraction(ceiling * heads)))
        assert Pyramid().layers(request)[0].tolist() == expected

    @given(request=even_requests())
    def test_no_layer_gets_more_than_one_before_it(self, request):
        """With the same limits everywhere, pages never grow from layer to layer."""
        pages = Pyramid().layers(request)[0].tolist()
        assert pages == sorted(pages, reverse=True)

    def test_sums_to_the_budget_where_the_authors_code_overshoots(self):
        """Capacity 128, window 8, 32 layers: 3840 beyond the windows; their floor of the step keeps 4016."""
        request = request_of(layers=32, kv_heads=1, budget=32 * 120, floor=0, ceiling=10_000)
        pages = Pyramid().layers(request)[0]
        assert (int(pages.sum()), int(pages[0]), int(pages[-1])) == (3840, 234, 6)

    def test_beta_1_is_uniform(self):
        """A pyramid without a slope."""
        request = request_of(layers=5, kv_heads=2, budget=77, floor=1, ceiling=30)
        assert torch.equal(Pyramid(beta=1).layers(request), Uniform().layers(request))

    def test_layers_with_a_short_window_leave_a_line_to_the_others(self):
        """What the clamp takes is redistributed along the line: the other layers have the same step between them."""
        request = request_of(layers=5, kv_heads=1, budget=62, floor=0, ceiling=1000)
        request.ceiling[:, [1, 3]] = 1
        assert Pyramid(beta=1.25).layers(request).tolist() == [[24, 1, 20, 1, 16]]

    def test_heads_are_even(self):
        """The heads of a layer differ by at most a page."""
        request = request_of(layers=2, kv_heads=4, budget=30, floor=0, ceiling=30)
        assert Pyramid().heads(request, 0, torch.tensor([22]), None).tolist() == [[6, 6, 5, 5]]

    @pytest.mark.parametrize("beta", [0.5, 0, float("nan"), float("inf")])
    def test_a_beta_that_makes_no_pyramid_is_refused(self, beta):
        """Below 1 the last layers would get more than the first."""
        with pytest.raises(ConfigError, match="beta"):
            Pyramid(beta=beta)

    def test_a_cache_keeps_what_the_pyramid_gives(self):
        """Beyond the tails of 16 tokens a mean of 4 pages of 16 a layer and head, on a line from 6 to 2."""
        model = pikv.ModelConfig(layers=3, query_heads=2, kv_heads=2, head_dim=4)
        cache = pikv.compose(
            model, allocator=Pyramid(beta=2), token_selector=Recent(), budget_tokens=80, page_size=16, tail_tokens=16
        )
        states = torch.zeros(1, 2, 400, 4)
        for layer_id in range(3):
            cache.update(layer_id, 0, states, states)
        cache.finish_prefill()
        assert [int(cache.retrieve(i).mask.sum()) for i in range(3)] == [2 * (16 + 16 * n) for n in (6, 4, 2)]


@attrs.frozen
class Broken(Allocator):
    """Uniform with one defect, named by the test of the suite that must find it."""

    defect: str

    def layers(self, request):
        pages = Uniform().layers(request)
        if self.defect == "layers_sum_to_the_budget":
            return torch.minimum(pages + 1, request.ceiling.sum(-1))
        if self.defect == "layers_are_whole_and_within_their_limits":
            return pages.flip(-1)
        if self.defect == "a_sequence_does_not_depend_on_the_others":
            return pages.amin(0, keepdim=True).expand_as(pages)
        if self.defect == "it_changes_nothing":
            request.budget_pages.zero_()
        return pages

    def heads(self, request, layer_id, pages, scores):
        if self.defect == "heads_sum_to_the_pages_of_their_layer":
            pages = pages + 1
        if self.defect == "heads_are_whole_and_within_their_limits":
            return Uniform().heads(request, layer_id, pages, scores).flip(-1)
        return Uniform().heads(request, layer_id, pages, scores)


@pytest.mark.slow  # hypothesis looks for the simplest case of each
@pytest.mark.parametrize("defect", sorted(name[5:] for name in vars(AllocatorConformance) if name.startswith("test_")))
def test_the_suite_finds_a_defect(defect):
    """Each test of the suite fails for an allocator that breaks the fact it states."""

    class Suite(AllocatorConformance):
        def make(self) -> Allocator:
            return Broken(defect)

    with pytest.raises((AssertionError, ExceptionGroup)):
        getattr(Suite(), f"test_{defect}")()
