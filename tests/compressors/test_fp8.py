"""FP8: numbers by hand, their error, and attention to what is decoded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.adapters.compressors import Fp8, LowRank, Rotated
from pikv.core.forms import KeyPrefix
from pikv.core.ports import Compressor
from pikv.testing import strategies as some
from pikv.testing.compressor import CompressorConformance
from pikv.testing.filled import check_attends_what_is_read

MODEL = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=32)


class TestFp8(CompressorConformance):
    def make(self) -> Compressor:
        return Fp8()

    def error_bound(self, form, pages, states, decoded, side):
        """A 16th, or half of the least step, 2**-9 of the scale; and the rounding of a float32 quotient."""
        of_keys = side == "keys" or isinstance(form.values, KeyPrefix)
        scales = form.view(pages, "key_scales" if of_keys else "value_scales").double()
        scales = scales[:, None, : states.shape[-1]] if of_keys else scales[..., None]
        return torch.maximum(states.abs() / 16, scales * 2.0**-10) * (1 + 1e-6)


def encoded(keys, values=None, dtype=torch.float32):
    layer = pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=keys.shape[-1], value_dim=keys.shape[-1])
    form = Fp8().form(layer, page_size=keys.shape[1], dtype=dtype)
    pages = torch.zeros(len(keys), form.stride, dtype=torch.uint8)
    Fp8().encode(form, keys, keys if values is None else values, torch.zeros(keys.shape[:2]), pages)
    return form, pages


def test_a_channel_by_hand():
    """Of 896, 2, 17 and 0.001 with a scale of 2: 448, 1, 8.5 in steps of 1, to the even 8; and 2**-11, to 0."""
    keys = torch.zeros(1, 16, 1)
    keys[0, :4, 0] = torch.tensor([896.0, 2.0, 17.0, 0.001])
    form, pages = encoded(keys)
    assert form.view(pages, "key_scales").tolist() == [[2.0]]
    back, values = Fp8().decode(form, pages)
    assert back[0, :5, 0].tolist() == [896.0, 2.0, 16.0, 0.0, 0.0]
    assert values[0, :5, 0].tolist() == pytest.approx([896.0, 2.0, 17.0, 0.001, 0.0], rel=0.01)  # a scale a token


def test_a_page_of_64_tokens_of_128_channels():
    """2 * 64 * 128 bytes, 256 of key scales, 128 of value scales, 256 of positions."""
    layer = pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=128, value_dim=128)
    assert Fp8().form(layer, page_size=64, dtype=torch.float16).stride == 2 * 64 * 128 + 256 + 128 + 256


@pytest.mark.property
@given(exponent=st.integers(-40, 36), generator=some.generators())
def test_no_magnitude_is_refused(exponent, generator):
    """From what bfloat16 holds of a scale up to its largest numbers, to a 16th or so."""
    keys = (torch.randn(2, 16, 3, generator=generator) * 10.0**exponent).bfloat16().float()
    back, _ = Fp8().decode(*encoded(keys))
    largest = keys.abs().amax(1, keepdim=True)
    bound = torch.maximum(keys.abs() / 16, largest / 448 * 2.0**-9) * 1.01 + 1e-37
    assert bool(((back - keys).abs() <= bound).all())


@pytest.mark.property
@given(
    compressor=st.sampled_from([Fp8(), Rotated(Fp8()), LowRank(rank=5, inner=Fp8())]),
    sizes=some.runtime_configs(),
    generator=some.generators(),
)
def test_attention_is_over_exactly_what_is_read_back(compressor, sizes, generator):
    """With all installed backends, alone, rotated, and of coordinates."""
    cache = pikv.compose(MODEL, compressor=compressor, page_size=sizes.page_size, tail_tokens=sizes.tail_tokens)
    check_attends_what_is_read(cache, generator, tolerance=1e-4)


def test_by_name():
    """Without settings."""
    assert pikv.runtime_from({"compressor": "fp8"}, MODEL).compressor == Fp8()
