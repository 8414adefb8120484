"""Rotary embedding: the definition, and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.testing import strategies as some


@pytest.mark.property
@given(half=st.integers(1, 8), rest=st.integers(0, 5), tokens=st.integers(0, 9), generator=some.generators())
def test_pairs_turn_with_the_position(half, rest, tokens, generator):
    """Channels i and i + dim / 2 turn by position * theta ** (-2 i / dim), and back; those past dim stay."""
    rotary = pikv.Rotary(dim=2 * half, theta=100.0)
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
    turned = pikv.Rotary(dim=2).apply(states, torch.tensor([math.pi / 2]))
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0]]), atol=1e-6, rtol=0)


def test_half_types_are_turned_in_float32():
    """And rounded once."""
    states, positions = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(3)
    turned = pikv.Rotary(dim=8).apply(states, positions)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, pikv.Rotary(dim=8).apply(states.float(), positions).bfloat16())
