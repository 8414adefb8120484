"""Rotation before rounding: the rotation itself, its pages, and attention in its basis."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.adapters.compressors import Exact, Int2, Int4, Int8, Rotated
from pikv.adapters.compressors.rotated import rotation
from pikv.core.forms import KeyPrefix
from pikv.core.ports import Compressor, FormCompressor
from pikv.policies import Quest
from pikv.testing import strategies as some
from pikv.testing.compressor import BasisConformance

MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=32)


class RotatedConformance(BasisConformance):
    """Coordinates come back as they do from the inner compressor: to half a scale."""

    def error_bound(self, form, pages, states, decoded, side):
        side = "keys" if isinstance(form.values, KeyPrefix) else side
        encoding = getattr(form, side)
        scales = form.view(pages, f"{side[:-1]}_scales").double().repeat_interleave(encoding.group, dim=1)
        scales = scales if side == "keys" else scales.mT
        return scales[..., : states.shape[-1]] / 2 + 2.0**-23 * torch.maximum(states.abs(), decoded.abs())


class TestRotatedInt8(RotatedConformance):
    def make(self) -> Compressor:
        return Rotated(Int8())


class TestRotatedInt4(RotatedConformance):
    def make(self) -> Compressor:
        return Rotated()


class TestRotatedInt2(RotatedConformance):
    def make(self) -> Compressor:
        return Rotated(Int2())


def test_a_rotation_of_four_channels():
    """Hadamard's matrix of Sylvester's construction, over 2."""
    by_hand = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    torch.testing.assert_close(rotation(4), by_hand)


def test_a_rotation_of_six_channels():
    """Twice the cosine transform of three entries: 1 / 3, (1, 0, -1) / 2 and (1, -2, 1) / 6 squared, half of each."""
    third = torch.tensor([[2, 2, 2], [3, 0, -3], [1, -2, 1]]) / torch.tensor(
        [[math.sqrt(12)], [math.sqrt(18)], [math.sqrt(6)]]
    )
    torch.testing.assert_close(third @ third.mT, torch.eye(3))
    by_hand = torch.cat([torch.cat([third, third], dim=1), torch.cat([third, -third], dim=1)]) / math.sqrt(2)
    torch.testing.assert_close(rotation(6), by_hand)


@pytest.mark.property
@given(st.integers(1, 300))
def test_a_rotation_is_orthogonal_and_even(dim):
    """Lengths stay, and no channel keeps more of itself than two of dim even shares."""
    turned = rotation(dim)
    torch.testing.assert_close(turned @ turned.mT, torch.eye(dim), atol=1e-5, rtol=0)
    assert float(turned.abs().max()) <= math.sqrt(2 / dim) * (1 + 1e-6) or dim == 1


def test_an_outlier_channel_is_shared_out():
    """One value channel of 100 among zeros: a group's scale falls from 100 / 3 to a 1 / sqrt(32) of it, doubled."""
    values = torch.zeros(1, 16, 32)
    values[..., 5] = 100.0
    basis = Rotated(Int2()).fit(MODEL.layers[0], values[None], values[None], torch.ones(1, 1, 16, dtype=torch.bool))
    scales = []
    for compressor, (keys, written) in ((Int2(), (values, values)), (Rotated(Int2()), basis.write(values, values))):
        form = compressor.form(MODEL.layers[0], page_size=16, dtype=torch.float32)
        pages = torch.zeros(1, form.stride, dtype=torch.uint8)
        compressor.encode(form, keys, written, torch.zeros(1, 16, dtype=torch.int32), pages)
        scales.append(float(form.view(pages, "value_scales").max()))
    assert scales[0] == pytest.approx(100 / 3, rel=1e-3)
    assert scales[1] == pytest.approx(2 * 100 / math.sqrt(32) / 3, rel=1e-3)


def test_pages_are_not_what_the_form_says_alone():
    """A backend that writes pages by their form must not write these from unrotated tokens."""
    assert not isinstance(Rotated(), FormCompressor)


def test_a_basis_within_a_basis_is_refused():
    """And so is what is no compressor."""
    for inner in (Rotated(), "int4"):
        with pytest.raises(pikv.ConfigError, match=r"inner must be a Compressor without a basis.*Int4\(\), got"):
            Rotated(inner)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_names_stand_for_rotated_compressors(bits):
    """int8_rotated, int4_rotated and int2_rotated, which take no settings of their own."""
    inner = {8: Int8(), 4: Int4(), 2: Int2()}[bits]
    assert pikv.runtime_from({"compressor": f"int{bits}_rotated"}, MODEL).compressor == Rotated(inner)
    with pytest.raises(pikv.ConfigError, match="it takes no settings"):
        pikv.runtime_from({"compressor": {"name": f"int{bits}_rotated", "bits": 3}}, MODEL)


def tokens(generator, batch, count, model=MODEL):
    layer = model.layers[0]
    shapes = ((layer.query_heads, layer.key_dim), (layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim))
    return [torch.randn(batch, heads, count, dim, generator=generator) for heads, dim in shapes]


@pytest.mark.property
@given(runtime=some.runtime_configs(), count=st.integers(1, 200), chunk=st.integers(1, 70), generator=some.generators())
def test_exact_pages_in_a_basis_change_nothing(runtime, count, chunk, generator):
    """With an exact inner compressor answers are those of exact pages, to rounding: queries enter, outputs leave."""
    runtimes = [
        runtime,
        pikv.RuntimeConfig(compressor=Rotated(Exact()), page_size=runtime.page_size, tail_tokens=runtime.tail_tokens),
    ]
    caches = [pikv.PiKVCache(MODEL, each) for each in runtimes]
    for start, size in ((0, count), (count, chunk)):
        q, k, v = tokens(generator, 2, size)
        answers = []
        for cache in caches:
            cache.update(0, start, k, v)
            answers.append(cache.attend(0, q))
        torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)
    exact, rotated = (cache.retrieve(0) for cache in caches)
    torch.testing.assert_close(rotated.keys, exact.keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotated.values, exact.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inner", [Int8(), Int4(), Int2()], ids=repr)
@pytest.mark.parametrize("chunk", [1, 40])
@pytest.mark.parametrize("composed", [pikv.compose, pikv.PiKVCache], ids=["installed backends", "torch"])
def test_attention_is_over_exactly_what_is_decoded(inner, chunk, composed):
    """`attend` equals attention in float64 over the unrotated keys and values that `retrieve` gives."""
    settings = {"compressor": Rotated(inner), "page_size": 32, "tail_tokens": 32}
    cache = composed(MODEL, **settings) if composed is pikv.compose else composed(MODEL, pikv.RuntimeConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    q, k, v = tokens(generator, 3, 300)
    cache.update(0, 0, k, v)
    cache.attend(0, q)
    q, k, v = tokens(generator, 3, chunk)
    cache.update(0, 300, k, v)
    context = cache.retrieve(0)
    seen = context.positions[:, :, None] <= torch.arange(300, 300 + chunk)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(),
        context.keys.double().repeat_interleave(2, dim=1),
        context.values.double().repeat_interleave(2, dim=1),
        attn_mask=seen.repeat_interleave(2, dim=1),
    )
    torch.testing.assert_close(cache.attend(0, q).double(), expected, atol=1e-3, rtol=1e-3)  # digits of 14 bits


def test_the_basis_is_counted_once():
    """32 * 32 float32 numbers, whatever the layers and sequences; a fork and a join go on with it."""
    cache = pikv.compose(MODEL, compressor=Rotated(), page_size=16, tail_tokens=16)
    assert cache.stored_bytes().bases == 0
    for layer_id in range(2):
        cache.update(layer_id, 0, *tokens(torch.Generator().manual_seed(0), 2, 100)[1:])
    cache.finish_prefill()
    assert cache.stored_bytes().bases == 32 * 32 * 4
    other = cache.fork()
    before = cache.retrieve(1)
    cache.join(other)
    cache.drop([0, 1])
    assert cache.stored_bytes().bases == 32 * 32 * 4
    assert torch.equal(cache.retrieve(1).keys, before.keys)


def test_latents_are_rotated_apart_from_what_is_beside_them():
    """So that the values are still the first part of the keys, and take no bytes."""
    layer = pikv.LayerConfig(query_heads=4, kv_heads=1, key_dim=40, value_dim=32, values="key_prefix")
    model = pikv.ModelConfig.of([layer])
    cache = pikv.compose(model, compressor=Rotated(Int8()), page_size=16, tail_tokens=16)
    q, k, _ = tokens(torch.Generator().manual_seed(0), 1, 200, model)
    cache.update(0, 0, k, None)
    cache.attend(0, q)
    context = cache.retrieve(0)
    torch.testing.assert_close(context.keys, k, atol=0.05, rtol=0)
    torch.testing.assert_close(context.values, context.keys[..., :32], atol=1e-5, rtol=0)
    cache.update(0, 200, k[:, :, :1], None)
    every, last = cache.retrieve(0), cache.attend(0, q[:, :, :1])
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, :1], every.keys, every.values, enable_gqa=True)
    torch.testing.assert_close(last, expected, atol=1e-4, rtol=1e-4)


def test_pages_are_chosen_by_unrotated_keys():
    """The index bounds the keys as they are read back, so a choice of all but one page leaves out the worst."""
    settings = {"compressor": Rotated(Int8()), "page_size": 16, "tail_tokens": 16}
    caches = [pikv.compose(MODEL, page_selector=Quest(pages=pages, dense_layers=0), **settings) for pages in (2, 9)]
    q, k, v = tokens(torch.Generator().manual_seed(0), 1, 144 + 16)
    k[:, :, 48:64] += 3 * q[:, ::2, -1:]  # the page that both heads' last queries look for
    answers = []
    for cache in caches:
        cache.update(0, 0, k, v)
        cache.finish_prefill()
        cache.update(0, 160, k[:, :, :1], v[:, :, :1])
        answers.append(cache.attend(0, q[:, :, -1:])[:, ::2])
    torch.testing.assert_close(*answers, atol=0.05, rtol=0)
