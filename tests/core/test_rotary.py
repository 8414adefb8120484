"""Rotary embedding: the definition, and back."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.core.ports import NeedsRotary, TokenSelector
from pikv.core.views import TokenView
from pikv.testing import strategies as some


@pytest.mark.property
@given(half=st.integers(1, 8), rest=st.integers(0, 5), tokens=st.integers(0, 9), generator=some.generators())
def test_pairs_turn_with_the_position(half, rest, tokens, generator):
    """Channels i and i + dim / 2 turn by position * theta ** (-2 i / dim), and back; those past dim stay."""
    rotary = pikv.Rotary.of(dim=2 * half, theta=100.0)
    states = torch.randn(2, tokens, 2 * half + rest, generator=generator)
    positions = torch.randint(0, 1000, (2, tokens), generator=generator)
    turned = rotary.apply(states, positions)
    for i in range(half):
        angle = positions.double() * 100.0 ** (-2 * i / (2 * half))
        pair = torch.complex(states[..., i].double(), states[..., i + half].double())
        expected = pair * torch.polar(torch.ones_like(angle), angle)
        torch.testing.assert_close(turned[..., i].double(), expected.real, atol=1e-3, rtol=0)
        torch.testing.assert_close(turned[..., i + half].double(), expected.imag, atol=1e-3, rtol=0)
    assert torch.equal(turned[..., 2 * half :], states[..., 2 * half :])
    torch.testing.assert_close(rotary.remove(turned, positions), states, atol=1e-5, rtol=0)


def test_a_quarter_turn():
    """At position 1 with an angle of pi / 2, (1, 0) becomes (0, 1)."""
    states = torch.tensor([[1.0, 0.0]])
    turned = pikv.Rotary.of(dim=2).apply(states, torch.tensor([math.pi / 2]))
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0]]), atol=1e-6, rtol=0)


def test_half_types_are_turned_in_float32():
    """And rounded once."""
    states, positions = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(3)
    turned = pikv.Rotary.of(dim=8).apply(states, positions)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, pikv.Rotary.of(dim=8).apply(states.float(), positions).bfloat16())


@pytest.mark.property
@given(pairs=st.integers(1, 6), start=st.integers(0, 4), scaling=st.floats(0.5, 2.0), generator=some.generators())
def test_neighbours_are_halves_in_another_order(pairs, start, scaling, generator):
    """Pairs of neighbours turn as pairs of halves do; the channels before the first pair stay; scaling is undone."""
    frequencies = tuple(torch.rand(pairs, generator=generator).tolist())
    halves = pikv.Rotary(frequencies=frequencies, start=start, scaling=scaling)
    neighbours = attrs.evolve(halves, pairing="neighbours")
    states, positions = torch.randn(5, start + 2 * pairs + 3, generator=generator), torch.arange(5)
    order = torch.arange(start + 2 * pairs + 3)
    order[start : start + 2 * pairs] = start + torch.arange(2 * pairs).view(pairs, 2).T.flatten()
    turned = neighbours.apply(states, positions)
    torch.testing.assert_close(turned[:, order], halves.apply(states[:, order], positions), atol=1e-5, rtol=0)
    assert torch.equal(turned[:, :start], states[:, :start])
    torch.testing.assert_close(neighbours.remove(turned, positions), states, atol=1e-4, rtol=0)


def test_an_unknown_pairing_is_refused():
    """By name."""
    with pytest.raises(pikv.ConfigError, match=r"pairing must be .* got 'thirds'"):
        pikv.Rotary(frequencies=(1.0,), pairing="thirds")


class Unrotated(TokenSelector, NeedsRotary):
    """Prefers tokens whose key before rotation is large in its first channel."""

    sinks, recent = 0, 1

    def score(self, view):
        return view.unrotated_keys[..., 0]


def test_a_part_that_unrotates_sees_keys_before_rotation():
    """Kept are the tokens that were large before they were rotated, wherever they stand."""
    rotary = pikv.Rotary.of(dim=8)
    model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=8, rotary=rotary)
    cache = pikv.compose(model, token_selector=Unrotated(), budget_tokens=20, page_size=16, tail_tokens=4)
    keys = torch.zeros(1, 1, 60, 8)
    large = torch.tensor([3, 17, 18, 29, 31, 44, 50])
    keys[:, :, large, 0] = 1.0
    keys = rotary.apply(keys, torch.arange(60))
    cache.update(0, 0, keys, keys)
    cache.finish_prefill()
    assert set(large.tolist()) <= set(cache.retrieve(0).positions.flatten().tolist())


def test_a_part_that_unrotates_is_refused_without_a_rotary():
    """When composed, by name and layer."""
    model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=8)
    with pytest.raises(pikv.ConfigError, match=r"layer 0 has no rotary.*Unrotated"):
        pikv.compose(model, token_selector=Unrotated(), budget_tokens=20, page_size=16, tail_tokens=4)


def test_a_view_without_a_rotary_says_so():
    """For a part that does not say that it needs one."""
    layer = pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=8, value_dim=8)
    view = TokenView(layer_id=0, layer=layer, positions=torch.zeros(1, 1, 1), decode=lambda: (None, None))
    with pytest.raises(pikv.StateError, match="NeedsRotary"):
        _ = view.unrotated_keys


def test_the_mean_rotation_is_the_mean_of_rotated_states():
    """For several first positions at once."""
    rotary, states = pikv.Rotary.of(dim=8), torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    turn = rotary.mean_rotation(torch.tensor([3, 40]), 7, dim=10)
    for row, first in enumerate((3, 40)):
        positions = torch.arange(first, first + 7)
        expected = rotary.apply(states[row].expand(7, -1), positions).mean(0)
        torch.testing.assert_close(turn[row] @ states[row], expected)
