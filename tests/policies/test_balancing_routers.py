"""Routers that know of far pages, full experts and many places, and the placement of replicas."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv import ConfigError, InputError
from pikv.core.ports import Observation, Router, RouterState
from pikv.policies import CacheAware, Capacity, Eplb, GroupLimited, LatencyAware, LoadBalance, TopK
from pikv.testing.placement import PlacementConformance
from pikv.testing.requests import RoutingCase, routing_cases
from pikv.testing.router import RouterConformance

pytestmark = pytest.mark.property
NO_TIME = {"tokens": torch.zeros(1, dtype=torch.int64), "seconds": torch.zeros(1, dtype=torch.float64)}


def counted(**counts: list[int]) -> Observation:
    return Observation(**NO_TIME, **{name: torch.tensor(each) for name, each in counts.items()})


def check_top_k(router: Router, case: RoutingCase) -> None:
    """The router gives what TopK gives, bit by bit, whatever was observed."""
    state = router.start(len(case.places), case.places)
    for seen in case.observed:
        state = router.observe(state, seen)
    got, expected = (each.route(state, case.probabilities, case.k) for each in (router, TopK()))
    assert torch.equal(got.experts, expected.experts)
    assert torch.equal(got.weights, expected.weights)


class TestCacheAware(RouterConformance):
    def make(self) -> CacheAware:
        return CacheAware(strength=0.5)

    @pytest.mark.parametrize(("lead", "expected"), [(0.68, 1), (0.70, 0)])
    def test_by_hand(self, lead, expected):
        """Of expert 0 one page is missing: it must lead by log(2) = 0.693 nats."""
        router = CacheAware()
        state = router.observe(router.start(2, torch.tensor([0, 0])), counted(misses=[1, 0]))
        assert router.route(state, torch.tensor([[lead, 0.0]]).softmax(-1), 1).home.tolist() == [expected]

    def test_a_count_replaces_the_last(self):
        """What has been fetched is missing no longer; where nobody counts, the last count holds."""
        router = CacheAware()
        state = router.observe(router.start(2, torch.tensor([0, 0])), counted(misses=[3, 0]))
        assert router.observe(state, counted()).misses.tolist() == [3, 0]
        assert router.observe(state, counted(misses=[0, 1])).misses.tolist() == [0, 1]

    @given(case=routing_cases())
    def test_with_strength_0_it_is_top_k(self, case: RoutingCase):
        """Bit by bit."""
        check_top_k(CacheAware(strength=0), case)


class TestLoadBalance(RouterConformance):
    def make(self) -> LoadBalance:
        return LoadBalance(rate=0.5)

    def test_by_hand(self):
        """Loads of 5, 1 and 3 have a mean of 3: biases -0.1, +0.1 and 0."""
        router = LoadBalance(rate=0.1)
        state = router.observe(router.start(3, torch.tensor([0, 0, 0])), counted(load=[5, 1, 3]))
        torch.testing.assert_close(state.bias, torch.tensor([-0.1, 0.1, 0.0], dtype=torch.float64))
        for lead, expected in ((0.19, 1), (0.21, 0)):
            probabilities = torch.tensor([[lead, 0.0, -9.0]]).softmax(-1)
            assert router.route(state, probabilities, 1).home.tolist() == [expected]

    def test_loads_even_out(self):
        """A gate that sends everything to one expert is evened out within a tenth, step by step."""
        router, gate = LoadBalance(rate=0.05), torch.Generator().manual_seed(0)
        state = router.start(4, torch.zeros(4, dtype=torch.int64))
        for _ in range(200):
            probabilities = (torch.randn(256, 4, generator=gate) + torch.tensor([2.0, 0.0, 0.0, -1.0])).softmax(-1)
            load = router.route(state, probabilities, 2).experts.flatten().bincount(minlength=4)
            state = router.observe(state, counted(load=load.tolist()))
        assert int((load - 128).abs().max()) < 26

    @given(case=routing_cases())
    def test_with_a_rate_of_0_it_is_top_k(self, case: RoutingCase):
        """Bit by bit."""
        check_top_k(LoadBalance(rate=0), case)


class TestCapacity(RouterConformance):
    def make(self) -> Capacity:
        return Capacity(factor=1)

    def test_by_hand(self):
        """Two experts with room for 2 of 4 tokens each: the two least probable of expert 0's go to expert 1."""
        leads = torch.tensor([0.9, 0.6, 0.7, 0.8])
        routing = Capacity(factor=1).route(
            Capacity().start(2, torch.tensor([0, 0])), torch.stack([leads, 1 - leads], dim=1), 1
        )
        assert routing.experts.tolist() == [[0], [1], [1], [0]]

    @given(case=routing_cases())
    def test_with_much_room_it_is_top_k(self, case: RoutingCase):
        """As much as there are experts: nobody is refused."""
        check_top_k(Capacity(factor=8), case)

    @given(seed=st.integers(0, 1000), tokens=st.integers(1, 40), experts=st.integers(1, 8))
    def test_with_one_expert_a_token_nobody_has_too_many(self, seed, tokens, experts):
        """K = 1 always fits: room for all tokens, and who is refused everywhere else still finds it."""
        probabilities = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).softmax(-1)
        router = Capacity(factor=1)
        load = router.route(router.start(experts, torch.zeros(experts, dtype=torch.int64)), probabilities, 1)
        assert int(load.experts.flatten().bincount().max()) <= -(-tokens // experts)


class TestGroupLimited(RouterConformance):
    def make(self) -> GroupLimited:
        return GroupLimited(groups=1)

    def test_by_hand(self):
        """Place 1 has .3 + .25, place 0 .4 + .05: both experts of place 1, though the best is at place 0."""
        router = GroupLimited(groups=1, best=2)
        state = router.start(4, torch.tensor([0, 0, 1, 1]))
        routing = router.route(state, torch.tensor([[0.4, 0.05, 0.3, 0.25]]), 2)
        assert routing.experts.tolist() == [[2, 3]]
        torch.testing.assert_close(routing.weights, torch.tensor([[0.3 / 0.55, 0.25 / 0.55]]))

    def test_as_many_groups_as_hold_k(self):
        """Three experts do not fit at one place of two."""
        router = GroupLimited(groups=1)
        state = router.start(4, torch.tensor([0, 0, 1, 1]))
        assert router.route(state, torch.tensor([[0.4, 0.05, 0.3, 0.25]]), 3).experts.tolist() == [[0, 2, 3]]

    @given(case=routing_cases())
    def test_with_all_groups_it_is_top_k(self, case: RoutingCase):
        """Nothing is left out."""
        check_top_k(GroupLimited(groups=4), case)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (CacheAware, {"strength": -1}),
        (LoadBalance, {"rate": float("nan")}),
        (Capacity, {"factor": 0.9}),
        (GroupLimited, {"groups": 0}),
        (Eplb, {"slots": 0}),
        (Eplb, {"groups": 3, "nodes": 2}),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(part, settings):
    """The message names the field."""
    with pytest.raises(ConfigError, match=next(iter(settings))):
        part(**settings)


@pytest.mark.parametrize("router", [CacheAware(), LoadBalance()])
def test_states_and_counts_of_others_are_refused(router):
    """A state comes from the router's own start, and counts are one for each expert."""
    places = torch.tensor([0, 1])
    with pytest.raises(InputError, match=f"must come from {type(router).__name__}"):
        router.route(RouterState(places=places), torch.full((1, 2), 0.5), 1)
    with pytest.raises(InputError, match="must be \\[experts\\]"):
        router.observe(router.start(2, places), counted(misses=[1, 1, 1], load=[1, 1, 1]))


@pytest.mark.parametrize("name", ["load", "misses"])
@pytest.mark.parametrize("counts", [torch.tensor([-1]), torch.tensor([0.5]), torch.zeros(1, 1, dtype=torch.int64)])
def test_counts_that_are_none_are_refused(name, counts):
    """int64 [experts], none negative."""
    with pytest.raises(InputError, match=f"{name} must be int64"):
        Observation(**NO_TIME, **{name: counts})


def test_routers_that_do_not_count_ignore_counts():
    """LatencyAware looks at times alone."""
    router = LatencyAware()
    state = router.start(2, torch.tensor([0, 0]))
    after = router.observe(state, counted(load=[3, 4], misses=[1, 1]))
    assert attrs.asdict(after).keys() == attrs.asdict(state).keys()


class TestEplb(PlacementConformance):
    def make(self) -> Eplb:
        return Eplb(slots=3, nodes=2, groups=4)

    def test_by_hand(self):
        """Loads 6, 2, 1 and 1 on 2 places of 3: two replicas more for expert 0, at 2 each; 5 and 5 to do."""
        placed = Eplb(slots=3).place(torch.tensor([6, 2, 1, 1]), 2)
        share = torch.tensor([2.0, 2.0, 1.0, 1.0])
        assert placed.shape == (2, 3)
        assert placed.flatten().bincount().tolist() == [3, 1, 1, 1]
        assert share[placed].sum(1).tolist() == [5.0, 5.0]

    def test_groups_stay_on_a_node(self):
        """The groups (0, 1), (2, 3), (4, 5) and (6, 7) go two to a node, whatever replicas there are."""
        load = torch.tensor([9, 1, 1, 1, 1, 1, 5, 1])
        placed = Eplb(slots=3, nodes=2, groups=4).place(load, 4)
        of_node = [set((row.flatten() // 2).tolist()) for row in placed.view(2, 6)]
        assert [len(groups) for groups in of_node] == [2, 2]
        assert of_node[0].isdisjoint(of_node[1])

    @given(
        load=st.lists(st.integers(0, 50), min_size=1, max_size=12), places=st.integers(1, 4), spare=st.integers(0, 3)
    )
    def test_every_expert_has_a_slot_and_replicas_help(self, load, places, spare):
        """The busiest place has no more to do than with one replica fewer a place."""
        slots = -(-len(load) // places)
        busiest = []
        for more in (0, spare):
            placed = Eplb(slots=slots + more).place(torch.tensor(load), places)
            assert placed.shape == (places, slots + more)
            counts = placed.flatten().bincount(minlength=len(load))
            assert int(counts.min()) >= 1
            busiest.append(float((torch.tensor(load).double() / counts).max()))
        assert busiest[1] <= busiest[0]

    @pytest.mark.parametrize(("experts", "places"), [(5, 2), (4, 3), (3, 2)])
    def test_what_cannot_be_split_is_refused(self, experts, places):
        """More experts than slots, places that nodes do not share evenly, experts that groups do not."""
        with pytest.raises(ConfigError, match="slots"):
            Eplb(slots=2, nodes=2, groups=2).place(torch.ones(experts), places)
