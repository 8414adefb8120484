"""The facts that every Allocator must hold to, as tests to inherit.

class TestMine(AllocatorConformance):
    def make(self) -> Allocator:
        return Mine()
"""

from __future__ import annotations

import attrs
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pikv.core.ports import Allocator
from pikv.core.views import AllocationRequest
from pikv.testing.policy import PolicyConformance, assert_equal, inherited
from pikv.testing.requests import allocation_requests

_TENSORS = ("budget_pages", "floor", "ceiling")


class AllocatorConformance(PolicyConformance):
    """Inherit, and say what `make` makes."""

    def make(self) -> Allocator:
        """Make the allocator to test, with the same settings every time."""
        raise NotImplementedError("make: return the allocator to test")

    @inherited
    @given(request=allocation_requests())
    def test_layers_sum_to_the_budget(self, request: AllocationRequest) -> None:
        """The pages of all layers sum to clamp(budget, sum of floors, sum of ceilings), exactly."""
        limits = (limit.sum((1, 2)) for limit in (request.floor, request.ceiling))
        assert_equal(self.make().layers(request).sum(-1), request.budget_pages.clamp(*limits), "sums over layers")

    @inherited
    @given(request=allocation_requests())
    def test_layers_are_whole_and_within_their_limits(self, request: AllocationRequest) -> None:
        """Each layer gets int64 pages, from the sum of its heads' floors to the sum of their ceilings."""
        _assert_within(self.make().layers(request), request.floor.sum(-1), request.ceiling.sum(-1))

    @inherited
    @given(request=allocation_requests(), data=st.data())
    def test_heads_sum_to_the_pages_of_their_layer(self, request: AllocationRequest, data: st.DataObject) -> None:
        """The pages of a layer's heads sum to clamp(pages, sum of floors, sum of ceilings), exactly."""
        for layer_id in range(request.floor.shape[1]):
            pages, scores = _draw_pages(data, request), _draw_scores(data, request)
            heads = self.make().heads(request, layer_id, pages, scores)
            limits = (limit[:, layer_id].sum(-1) for limit in (request.floor, request.ceiling))
            assert_equal(heads.sum(-1), pages.clamp(*limits), f"sums over the heads of layer {layer_id}")

    @inherited
    @given(request=allocation_requests(), data=st.data())
    def test_heads_are_whole_and_within_their_limits(self, request: AllocationRequest, data: st.DataObject) -> None:
        """Each head gets int64 pages, from its floor to its ceiling: none where the layer has no such head."""
        for layer_id in range(request.floor.shape[1]):
            heads = self.make().heads(request, layer_id, _draw_pages(data, request), _draw_scores(data, request))
            _assert_within(heads, request.floor[:, layer_id], request.ceiling[:, layer_id])

    @inherited
    @given(request=allocation_requests(), data=st.data())
    def test_a_sequence_does_not_depend_on_the_others(self, request: AllocationRequest, data: st.DataObject) -> None:
        """Each sequence of a batch gets what it gets alone."""
        pages, scores = _draw_pages(data, request), _draw_scores(data, request)
        layers = self.make().layers(request)
        heads = self.make().heads(request, 0, pages, scores)
        for i in range(len(pages)):
            alone = attrs.evolve(request, **{name: getattr(request, name)[i : i + 1] for name in _TENSORS})
            part = None if scores is None else scores[i : i + 1]
            assert_equal(self.make().layers(alone), layers[i : i + 1], f"layers of sequence {i} alone")
            assert_equal(
                self.make().heads(alone, 0, pages[i : i + 1], part), heads[i : i + 1], f"heads of sequence {i}"
            )

    @inherited
    @given(request=allocation_requests(), data=st.data())
    def test_it_changes_nothing(self, request: AllocationRequest, data: st.DataObject) -> None:
        """The request, the pages and the scores stay as they are."""
        shown = {name: getattr(request, name) for name in _TENSORS}
        shown |= {"pages": _draw_pages(data, request), "scores": _draw_scores(data, request, may_be_none=False)}
        before = {name: tensor.clone() for name, tensor in shown.items()}
        self.make().layers(request)
        self.make().heads(request, 0, shown["pages"], shown["scores"])
        for name, tensor in shown.items():
            assert_equal(tensor, before[name], f"{name} after")


def _assert_within(got: Tensor, floor: Tensor, ceiling: Tensor) -> None:
    assert got.dtype == torch.int64, f"got {got.dtype}, expected int64"
    assert got.shape == floor.shape, f"got {list(got.shape)}, expected {list(floor.shape)}"
    assert bool((got >= floor).all()), f"got {got.tolist()}, below the floor {floor.tolist()}"
    assert bool((got <= ceiling).all()), f"got {got.tolist()}, above the ceiling {ceiling.tolist()}"


def _draw_pages(data: st.DataObject, request: AllocationRequest) -> Tensor:
    most = int(request.ceiling.sum(-1).max()) + 2
    return torch.tensor([data.draw(st.integers(0, most)) for _ in request.budget_pages])


def _draw_scores(data: st.DataObject, request: AllocationRequest, *, may_be_none: bool = True) -> Tensor | None:
    """Scores of 0 to 9 tokens for every head of the request; not for those alone that the layer has."""
    if may_be_none and data.draw(st.booleans()):
        return None
    sequences, _, kv_heads = request.floor.shape
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    return torch.rand(sequences, kv_heads, data.draw(st.integers(0, 9)), generator=generator)
