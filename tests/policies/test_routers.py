from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given

from pikv import ConfigError, InputError
from pikv.core.ports import Observation, Router, RouterState, Routing
from pikv.policies import LatencyAware, TopK
from pikv.testing.requests import RoutingCase, routing_cases
from pikv.testing.router import RouterConformance

pytestmark = pytest.mark.property


def observed(tokens: list[int], seconds: list[float]) -> Observation:
    return Observation(tokens=torch.tensor(tokens), seconds=torch.tensor(seconds, dtype=torch.float64))


class TestTopK(RouterConformance):
    def make(self) -> TopK:
        return TopK()

    def test_the_most_probable_come_first(self):
        """Experts in the order of their probabilities; the first is the token's home."""
        routing = TopK().route(TopK().start(4, torch.arange(4)), torch.tensor([[0.125, 0.5, 0.125, 0.25]]), 2)
        assert routing.experts.tolist() == [[1, 3]]
        torch.testing.assert_close(routing.weights, torch.tensor([[2 / 3, 1 / 3]]))
        assert routing.home.tolist() == [1]


class TestLatencyAware(RouterConformance):
    def make(self) -> LatencyAware:
        return LatencyAware(strength=0.5, smoothing=0.3)

    def test_routes_by_the_score_of_the_formula(self):
        """The score is log p_e - lambda * latency_e, in nats and milliseconds per token: here 0.5 nats."""
        router = LatencyAware(strength=0.25)
        state = router.observe(router.start(2, torch.tensor([0, 1])), observed([100, 100], [0.2, 0.0]))
        for lead, expected in ((0.49, 1), (0.51, 0)):  # of expert 0, in nats
            probabilities = torch.tensor([[lead, 0.0]]).softmax(-1)
            assert router.route(state, probabilities, 1).home.tolist() == [expected]

    @given(case=routing_cases())
    def test_with_strength_0_it_is_top_k(self, case: RoutingCase):
        """Experts and weights bit by bit, ties included, whatever was observed."""
        router = LatencyAware(strength=0)
        state = router.start(len(case.places), case.places)
        for seen in case.observed:
            state = router.observe(state, seen)
        got = router.route(state, case.probabilities, case.k)
        expected = TopK().route(state, case.probabilities, case.k)
        assert torch.equal(got.experts, expected.experts)
        assert torch.equal(got.weights, expected.weights)

    def test_with_strength_0_neighbouring_probabilities_are_told_apart(self):
        """Not by their logarithms, which would be equal."""
        small = torch.tensor(1e-300, dtype=torch.float64)
        probabilities = torch.stack([small, small.nextafter(torch.ones(())), 1 - 2 * small])[None]
        router = LatencyAware(strength=0)
        assert router.route(router.start(3, torch.arange(3)), probabilities, 2).experts.tolist() == [[2, 1]]

    def test_load_moves_away_from_a_slow_place(self):
        """Four experts on two places; the slower one place is, the fewer tokens are routed to it."""
        probabilities = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
        router, loads = LatencyAware(strength=1.0), []
        for seconds in (0.1, 0.2, 0.4, 0.8):
            state = router.observe(router.start(4, torch.tensor([0, 0, 1, 1])), observed([100, 100], [0.1, seconds]))
            loads.append(int((router.route(state, probabilities, 1).home >= 2).sum()))
        assert loads == sorted(set(loads), reverse=True)
        assert loads[0] > 200
        assert loads[-1] < 20

    def test_latency_is_a_moving_average(self):
        """The first observation counts whole, each later one with the weight `smoothing`, idle places not at all."""
        router = LatencyAware(smoothing=0.25)
        state = router.start(2, torch.tensor([1, 0]))
        for seen in (observed([10, 0], [0.1, 9.0]), observed([10, 20], [0.5, 0.4]), observed([0, 0], [1.0, 1.0])):
            state = router.observe(state, seen)
        torch.testing.assert_close(state.seconds_per_token, torch.tensor([0.02, 0.02], dtype=torch.float64))

    def test_one_observation_changes_an_average_by_a_bounded_factor(self):
        """Up and down; the first one counts whole, and from 0 there is no factor."""
        router = LatencyAware(smoothing=0.5, most_change=1.5)
        state, before = router.start(2, torch.tensor([0, 1])), torch.tensor([0.01, 0.0], dtype=torch.float64)
        for seen, factors in (([0.01, 0.0], [1.0, 0.0]), ([9.0, 0.0], [1.5, 0.0]), ([0.0, 0.2], [1 / 1.5, 0.0])):
            state = router.observe(state, observed([1, 1], seen))
            torch.testing.assert_close(state.seconds_per_token[:1], before[:1] * factors[0])
            before = state.seconds_per_token
        torch.testing.assert_close(before[1], torch.tensor(0.1, dtype=torch.float64))

    def test_an_unmeasured_place_counts_as_the_mean(self):
        """Between a slower and a faster one; and when none is measured, all are alike."""
        router = LatencyAware(strength=1.0)
        fresh = router.start(3, torch.tensor([0, 1, 2]))
        fair = torch.full((1, 3), 1 / 3)
        state = router.observe(fresh, observed([1, 0, 1], [0.003, 0.0, 0.001]))
        assert router.route(state, fair, 3).experts.tolist() == [[2, 1, 0]]
        leaning = torch.tensor([[0.3, 0.4, 0.3]])
        assert router.route(fresh, leaning, 1).home.tolist() == [1]

    def test_a_state_of_another_router_is_refused(self):
        """TopK's state knows no latencies."""
        state = TopK().start(2, torch.tensor([0, 1]))
        with pytest.raises(InputError, match=r"LatencyAware\.start"):
            LatencyAware().route(state, torch.full((1, 2), 0.5), 1)
        with pytest.raises(InputError, match=r"LatencyAware\.start"):
            LatencyAware().observe(state, observed([1, 1], [0.1, 0.1]))

    def test_an_observation_without_all_places_is_refused(self):
        """Every place that holds experts has its entry."""
        with pytest.raises(InputError, match="3 places"):
            LatencyAware().observe(LatencyAware().start(2, torch.tensor([0, 2])), observed([1, 1], [0.1, 0.1]))

    @pytest.mark.parametrize(
        "settings",
        [{"strength": -1}, {"strength": float("nan")}, {"smoothing": 0}, {"smoothing": 2}, {"most_change": 1}],
    )
    def test_settings_that_cannot_work_are_refused(self, settings):
        """The message names the setting."""
        with pytest.raises(ConfigError, match=next(iter(settings))):
            LatencyAware(**settings)


@pytest.mark.parametrize(("tokens", "seconds"), [([1, 1], [0.1]), ([-1], [0.1]), ([1], [-0.1]), ([1], [float("nan")])])
def test_an_observation_that_cannot_be_is_refused(tokens, seconds):
    """Tokens and seconds are for the same places, and not negative."""
    with pytest.raises(InputError, match="tokens and seconds"):
        observed(tokens, seconds)


@attrs.frozen
class Broken(Router):
    """TopK with one defect, named by the test of the suite that must find it."""

    defect: str

    def start(self, experts, places):
        if self.defect == "wrong_places_are_refused":
            places = places[:experts].long().abs()
            experts = len(places)
        if self.defect == "the_same_state_routes_alike":
            return Forgetful(places=places, names=("one",))
        return TopK().start(experts, places)

    def route(self, state, probabilities, k):
        if self.defect == "nothing_is_changed":
            probabilities.neg_()
        if self.defect == "wrong_probabilities_are_refused":
            probabilities = probabilities.clamp(min=0)
        routing = TopK().route(state, probabilities, k)
        if self.defect == "each_token_goes_to_k_different_experts":
            return Routing.to(routing.experts[:, :1].expand(-1, k), probabilities)
        if self.defect == "weights_are_the_gates_own":
            return Routing(routing.experts, torch.full_like(routing.weights, 1 / k))
        return routing

    def observe(self, state, seen):
        if self.defect == "a_step_without_tokens_teaches_nothing":
            return attrs.evolve(state, places=state.places + 1)
        return state


@attrs.frozen(kw_only=True)
class Forgetful(RouterState):
    names: tuple[str, ...]


@pytest.mark.slow  # hypothesis looks for the simplest case of each
@pytest.mark.parametrize("defect", sorted(name[5:] for name in vars(RouterConformance) if name.startswith("test_")))
def test_the_suite_finds_a_defect(defect):
    """Each test of the suite fails for a router that breaks the fact it states."""

    class Suite(RouterConformance):
        def make(self) -> Router:
            return Broken(defect)

    with pytest.raises((AssertionError, ExceptionGroup, InputError)):
        getattr(Suite(), f"test_{defect}")()
