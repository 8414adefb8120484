"""Low rank: the basis of each sequence, its pages, and attention in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.adapters.compressors import Exact, Int8, LowRank, Rotated
from pikv.core.ports import Compressor
from pikv.testing import strategies as some
from pikv.testing.compressor import BasisConformance

MODEL = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=32)


class TestLowRank(BasisConformance):
    """Coordinates in the model's dtype, to its rounding."""

    def make(self) -> Compressor:
        return LowRank(rank=16)

    def layers(self):
        return [layer for layer in super().layers() if layer.values == "stored"]


class TestLowRankInt8(TestLowRank):
    """Coordinates of 8 bits, to half a scale."""

    def make(self) -> Compressor:
        return LowRank(rank=16, inner=Int8())

    def error_bound(self, form, pages, states, decoded, side):
        encoding = getattr(form, side)
        scales = form.view(pages, f"{side[:-1]}_scales").double().repeat_interleave(encoding.group, dim=1)
        return (scales if side == "keys" else scales.mT) / 2 + 2.0**-23 * torch.maximum(states.abs(), decoded.abs())


def test_the_basis_is_the_direction_of_the_keys():
    """Keys along (3, 4) / 5 have one coordinate, their length; what stands across is lost."""
    layer = pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=2, value_dim=2)
    keys = torch.tensor([[3.0, 4.0], [-6.0, -8.0]])[None, None]
    basis = LowRank(rank=1).fit(layer, keys, keys, torch.ones(1, 1, 2, dtype=torch.bool))
    torch.testing.assert_close(basis.keys.abs(), torch.tensor([0.6, 0.8])[None, None, :, None])
    coordinates, _ = basis.write(keys, keys)
    torch.testing.assert_close(coordinates.abs(), torch.tensor([5.0, 10.0])[None, None, :, None])
    across = torch.tensor([[-4.0, 3.0]])[None, None]
    back, values = basis.read(*basis.write(across, across))
    torch.testing.assert_close(back, torch.zeros(1, 1, 1, 2), atol=1e-6, rtol=0)
    assert torch.equal(values, across)


@pytest.mark.property
@given(
    rank=st.integers(1, 32),
    inner=st.sampled_from([Exact(), Int8()]),
    sizes=some.runtime_configs(),
    generator=some.generators(),
)
def test_attention_is_over_exactly_what_is_read_back(rank, inner, sizes, generator):
    """With all installed backends: `attend` equals attention over what `retrieve` gives, whatever is lost of it."""
    cache = pikv.compose(
        MODEL, compressor=LowRank(rank=rank, inner=inner), page_size=sizes.page_size, tail_tokens=sizes.tail_tokens
    )
    q, k, v = (torch.randn(2, heads, 150, 32, generator=generator) for heads in (4, 2, 2))
    cache.update(0, 0, k, v)
    cache.finish_prefill()
    cache.update(0, 150, k[:, :, :1], v[:, :, :1])
    context = cache.retrieve(0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, :1], context.keys, context.values, enable_gqa=True
    )
    torch.testing.assert_close(cache.attend(0, q[:, :, :1]), expected, atol=1e-3, rtol=1e-3)


def test_keys_of_low_rank_come_back():
    """Eight directions, in a third of the bytes of keys; later keys along them come back too."""
    cache = pikv.compose(MODEL, compressor=LowRank(rank=8), page_size=16, tail_tokens=16)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(1, 2, 8, 32, generator=generator)
    k = torch.randn(1, 2, 320, 8, generator=generator) @ directions
    for start in (0, 160):
        cache.update(0, start, k[:, :, start : start + 160], torch.zeros(1, 2, 160, 32))
        cache.finish_prefill()
    torch.testing.assert_close(cache.retrieve(0).keys, k, atol=1e-4, rtol=1e-4)
    held = cache.stored_bytes()
    assert held.bases == 2 * 32 * 8 * 4
    assert held.pages == 2 * 19 * 16 * 4 * (8 + 32 + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(rank=0), "rank must be a positive whole number of channels, got 0"),
        (lambda: LowRank(rank=4, inner=Rotated()), "inner must be a Compressor without a basis"),
        (lambda: pikv.compose(MODEL, compressor=LowRank(rank=33)), "rank must be at most key_dim = 32, got 33"),
        (
            lambda: pikv.compose(
                pikv.ModelConfig.of(
                    [pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=8, value_dim=4, values="key_prefix")]
                ),
                compressor=LowRank(rank=4),
            ),
            "LowRank needs values that are stored",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    """When made, or when composed."""
    with pytest.raises(pikv.ConfigError, match=message):
        make()


def test_by_name():
    """The name takes a rank, and an inner compressor by its own name."""
    names = {"compressor": {"name": "low_rank", "rank": 8, "inner": "int8"}}
    assert pikv.runtime_from(names, MODEL).compressor == LowRank(rank=8, inner=Int8())
