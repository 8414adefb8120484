"""The facts that every Router must hold to, as tests to inherit.

class TestMine(RouterConformance):
    def make(self) -> Router:
        return Mine()
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from hypothesis import given
from torch import Tensor

from pikv.core.errors import InputError
from pikv.core.ports import Observation, Router, RouterState
from pikv.testing.policy import PolicyConformance, assert_close, assert_equal, inherited
from pikv.testing.requests import RoutingCase, observations, routing_cases


class RouterConformance(PolicyConformance):
    """Inherit, and say what `make` makes."""

    def make(self) -> Router:
        """Make the router to test, with the same settings every time."""
        raise NotImplementedError("make: return the router to test")

    def state(self, case: RoutingCase) -> RouterState:
        """What the router knows after the steps of the case."""
        state = self.make().start(len(case.places), case.places)
        for seen in case.observed:
            state = self.make().observe(state, seen)
        return state

    @inherited
    @given(case=routing_cases())
    def test_each_token_goes_to_k_different_experts(self, case: RoutingCase) -> None:
        """Experts are int64 [tokens, k], all different; there may be no tokens."""
        experts = self.make().route(self.state(case), case.probabilities, case.k).experts
        assert experts.dtype == torch.int64, f"experts are {experts.dtype}"
        assert experts.shape == (len(case.probabilities), case.k), f"experts are {list(experts.shape)}"
        for chosen in experts.tolist():
            assert len(set(chosen)) == case.k, f"experts {chosen} are not {case.k} different ones"
            assert set(chosen) <= set(range(len(case.places))), f"experts {chosen} of {len(case.places)}"

    @inherited
    @given(case=routing_cases())
    def test_weights_are_the_gates_own(self, case: RoutingCase) -> None:
        """Weights are the gate's probabilities of the chosen experts, made to sum to 1, in their dtype."""
        routing = self.make().route(self.state(case), case.probabilities, case.k)
        chosen = case.probabilities.gather(-1, routing.experts)
        assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True), "weights")

    @inherited
    @given(case=routing_cases())
    def test_the_same_state_routes_alike(self, case: RoutingCase) -> None:
        """A state rebuilt from copies of its tensors, as after a restore, gives the same routing, bit by bit."""
        state = self.state(case)
        rebuilt = attrs.evolve(state, **{name: tensor.clone() for name, tensor in _tensors(state).items()})
        once, again = (self.make().route(known, case.probabilities, case.k) for known in (state, rebuilt))
        assert_equal(again.experts, once.experts, "experts by the rebuilt state")
        assert_equal(again.weights, once.weights, "weights by the rebuilt state")

    @inherited
    @given(case=routing_cases(), seen=observations())
    def test_nothing_is_changed(self, case: RoutingCase, seen: Observation) -> None:
        """Neither `route` nor `observe` changes the state or what it is given."""
        state = self.state(case)
        shown = {**_tensors(state), **_tensors(seen), "probabilities": case.probabilities}
        before = {name: tensor.clone() for name, tensor in shown.items()}
        self.make().route(state, case.probabilities, case.k)
        self.make().observe(state, seen)
        for name, tensor in shown.items():
            assert_equal(tensor, before[name], f"{name} after")

    @inherited
    @given(case=routing_cases())
    def test_a_step_without_tokens_teaches_nothing(self, case: RoutingCase) -> None:
        """When no place computed anything, what is known stays the same, whatever the clocks say."""
        state = self.state(case)
        idle = Observation(tokens=torch.zeros(4, dtype=torch.int64), seconds=torch.full((4,), torch.nan))
        after = _tensors(self.make().observe(state, idle))
        for name, tensor in _tensors(state).items():
            assert_equal(after[name], tensor, f"{name} after an idle step")

    def test_wrong_places_are_refused(self) -> None:
        """Places are int64, one for each expert, and not negative."""
        for places in (torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.tensor([0, 1, -1])):
            _assert_refused(f"places {places.tolist()}", self.make().start, 3, places)
        _assert_refused("no experts", self.make().start, 0, torch.zeros(0, dtype=torch.int64))

    def test_wrong_probabilities_are_refused(self) -> None:
        """Probabilities are floating [tokens, experts], not logits, and k is between 1 and the number of experts."""
        state, fair = self.make().start(3, torch.tensor([0, 1, 1])), torch.full((2, 3), 1 / 3)
        for k in (0, 4):
            _assert_refused(f"k = {k} of 3 experts", self.make().route, state, fair, k)
        logits = torch.tensor([[0.3, -0.2, 0.1]])
        for wrong in (fair[:, :2], fair[0], fair.long(), logits, fair * torch.nan):
            _assert_refused(f"probabilities {wrong.tolist()}", self.make().route, state, wrong, 1)


def _tensors(values: RouterState | Observation) -> dict[str, Tensor]:
    """The fields by name, all of which are tensors."""
    fields = {field.name: getattr(values, field.name) for field in attrs.fields(type(values))}
    for name, field in fields.items():
        assert isinstance(field, Tensor), f"{name} of {type(values).__name__} is {field!r}, not a tensor"
    return fields


def _assert_refused(what: str, operation: Callable[..., object], *arguments: object) -> None:
    try:
        operation(*arguments)
    except InputError:
        return
    raise AssertionError(f"{what}: InputError was not raised")
