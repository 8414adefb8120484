"""Leading coordinates and outliers: which tokens are kept whole, and what low rank has of it."""

from __future__ import annotations

import attrs
import pytest
import torch

import pikv
from pikv.adapters.compressors import Exact, Int8, Leading, LowRank, UnrotatedLowRank
from pikv.core.ports import Compressor
from pikv.testing.compressor import BasisConformance, CompressorConformance

MODEL = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=32, rotary=pikv.Rotary.of(dim=32))


def stored_alone(layers):
    return [layer for layer in layers if layer.values == "stored"]


def bound_of(form, pages, states, side):
    """Values are exact; keys have lost at most what is beyond the rank, unless they are outliers."""
    if side == "values":
        return torch.zeros(())
    slots = form.view(pages, "outlier_slots").long()[..., None].expand(-1, -1, states.shape[-1])
    bound = states.abs().clone()
    bound[..., :16] = 0
    return bound.scatter(1, slots, 0.0)


class TestLeading(CompressorConformance):
    def make(self) -> Compressor:
        return Leading(rank=16, outliers=3, inner=Exact())

    def layers(self):
        return stored_alone(super().layers())

    def error_bound(self, form, pages, states, decoded, side):
        return bound_of(form, pages, states, side)


class TestLowRankWithOutliers(BasisConformance):
    def make(self) -> Compressor:
        return LowRank(rank=16, outliers=3)

    def layers(self):
        return stored_alone(super().layers())

    def error_bound(self, form, pages, states, decoded, side):
        return bound_of(form, pages, states, side)


def test_the_tokens_that_lose_most_are_whole():
    """Of keys (i, 0, lost) with 0, 3, -5 and 1 lost, two outliers are the tokens 1 and 2."""
    layer = pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=3, value_dim=1)
    compressor = Leading(rank=1, outliers=2, inner=Exact())
    form = compressor.form(layer, page_size=16, dtype=torch.float32)
    keys = torch.zeros(1, 16, 3)
    keys[0, :, 0] = torch.arange(16)
    keys[0, :4, 2] = torch.tensor([0.0, 3.0, -5.0, 1.0])
    pages = torch.zeros(1, form.stride, dtype=torch.uint8)
    compressor.encode(form, keys, keys[..., :1], torch.zeros(1, 16), pages)
    assert form.view(pages, "outlier_slots").tolist() == [[1, 2]]
    keys[0, 3, 2] = 0.0
    assert torch.equal(compressor.decode(form, pages)[0], keys)
    assert form.stride == 64 + 64 + 64 + 64 + 64  # keys, values, positions, 2 * 3 float32 numbers, 2 slots


@pytest.mark.parametrize("part", [LowRank, UnrotatedLowRank])
@pytest.mark.parametrize("inner", [Exact(), Int8()], ids=repr)
def test_outliers_of_low_rank_come_back(part, inner):
    """One token of each page lies across all others; it is there to the model's rounding, and in the scores."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(2, 32, 32, generator=generator)).Q
    plain = torch.randn(1, 2, 160, 4, generator=generator) @ directions[:, :4]
    odd = torch.arange(5, 160, 16)
    plain[:, :, odd] = 0.5 * directions[:, None, 9]
    k = MODEL.layers[0].rotary.apply(plain, torch.arange(160)) if part is UnrotatedLowRank else plain
    cache = pikv.compose(MODEL, compressor=part(rank=4, inner=inner, outliers=1), page_size=16, tail_tokens=16)
    cache.update(0, 0, k, torch.zeros_like(k))
    cache.finish_prefill()
    back = cache.retrieve(0).keys
    torch.testing.assert_close(back[:, :, odd], k[:, :, odd], atol=1e-5, rtol=0)
    torch.testing.assert_close(back, k, atol=1e-4 if inner == Exact() else 0.05, rtol=0)
    held = cache.stored_bytes()
    assert held.bases == 2 * 32 * 32 * 4
    form = cache.runtime.form(MODEL, 0)
    assert held.pages == 2 * 9 * form.stride
    assert form.stride == part(rank=4, inner=inner).form(MODEL.layers[0], page_size=16, dtype=torch.float32).stride + (
        128 + 64  # a key of 32 float32 numbers, and where it stood
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LowRank(rank=4, outliers=-1),
            "outliers must be a whole number of tokens .* got -1",
        ),
        (lambda: Leading(rank=4, outliers=0, inner=Exact()), "outliers must be a positive whole number, got 0"),
        (
            lambda: pikv.compose(MODEL, compressor=LowRank(rank=4, outliers=17), page_size=16, tail_tokens=16),
            "outliers must be at most page_size = 16, got 17; lower them",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    """When made, or when composed."""
    with pytest.raises(pikv.ConfigError, match=message):
        make()


def test_by_name():
    """Low rank takes them as a setting; equal settings are equal."""
    names = {"compressor": {"name": "low_rank", "rank": 8, "outliers": 2, "inner": "int8"}}
    made = pikv.runtime_from(names, MODEL).compressor
    assert made == LowRank(rank=8, outliers=2, inner=Int8())
    assert attrs.evolve(made, outliers=0).inner == Int8()
