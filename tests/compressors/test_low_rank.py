"""Low rank: the basis of each sequence, its pages, and attention in it."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.adapters.compressors import Axes, Exact, Int8, LowRank, Rotated, UnrotatedLowRank, load_axes, save_axes
from pikv.core.ports import Compressor
from pikv.testing import strategies as some
from pikv.testing.compressor import BasisConformance
from pikv.testing.filled import check_attends_what_is_read

MODEL = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=32, rotary=pikv.Rotary.of(dim=32))


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


class TestUnrotatedLowRank(TestLowRank):
    """Coordinates of keys before rotation are written as those after it."""

    def make(self) -> Compressor:
        return UnrotatedLowRank(rank=16)


class TestCalibrated(TestLowRank):
    """With the axes of two KV heads of 64 channels."""

    def make(self) -> Compressor:
        keys = torch.randn(1, 2, 100, 64, generator=torch.Generator().manual_seed(3))
        return LowRank(rank=16, axes=Axes.of(keys, torch.arange(100).expand(1, 2, -1)))

    def layers(self):
        return [pikv.LayerConfig(query_heads=2, kv_heads=2, key_dim=64, value_dim=20)]


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
    part=st.sampled_from([LowRank, UnrotatedLowRank]),
    rank=st.sampled_from([1, 5, 16, 32]),  # kernels are compiled for each
    inner=st.sampled_from([Exact(), Int8()]),
    calibrated=st.booleans(),
    sizes=some.runtime_configs(),
    generator=some.generators(),
)
def test_attention_is_over_exactly_what_is_read_back(part, rank, inner, calibrated, sizes, generator):
    """With all installed backends: `attend` equals attention over what `retrieve` gives, whatever is lost of it."""
    axes = Axes.of(torch.randn(1, 2, 50, 32, generator=generator), torch.zeros(1, 2, 50)) if calibrated else None
    compressor = part(rank=rank, inner=inner, axes=axes)
    cache = pikv.compose(MODEL, compressor=compressor, page_size=sizes.page_size, tail_tokens=sizes.tail_tokens)
    check_attends_what_is_read(cache, generator, tolerance=1e-3)


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
        (lambda: LowRank(rank=0), "rank must be a positive whole number, got 0"),
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
        (lambda: LowRank(rank=4, axes="axes.pt"), "axes must be a Axes object, got 'axes.pt'"),
        (
            lambda: Axes(torch.eye(4)),
            r"axes must be float32 \[kv_heads, key_dim, key_dim\], got torch.float32 \[4, 4\]",
        ),
        (
            lambda: pikv.compose(MODEL, compressor=LowRank(rank=4, axes=Axes(torch.eye(8).expand(2, -1, -1)))),
            r"axes of LowRank must be .* = \[2, 32, 32\], got \[2, 8, 8\]; calibrate it with this model",
        ),
        (
            lambda: pikv.compose(
                pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=32), compressor=UnrotatedLowRank(rank=4)
            ),
            "layer 0 has no rotary",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    """When made, or when composed."""
    with pytest.raises(pikv.ConfigError, match=message):
        make()


def read(cache, k, start=0):
    cache.update(0, start, k, torch.zeros_like(k))
    cache.finish_prefill()
    return cache


def test_keys_before_rotation_by_hand():
    """At 0, 90 and 180 degrees the key (3, 4) is (3, 4), (-4, 3) and (-3, -4): one direction before, two after."""
    rotary = pikv.Rotary(frequencies=(math.pi / 2,))
    layer = pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=2, value_dim=2, rotary=rotary)
    k = torch.tensor([[3.0, 4.0], [-4.0, 3.0], [-3.0, -4.0], [4.0, -3.0]]).repeat(8, 1)[None, None]
    caches = [
        read(pikv.compose(pikv.ModelConfig.of([layer]), compressor=part(rank=1), page_size=16, tail_tokens=16), k)
        for part in (UnrotatedLowRank, LowRank)
    ]
    torch.testing.assert_close(caches[0].retrieve(0).keys, k, atol=1e-4, rtol=0)
    assert float((caches[1].retrieve(0).keys - k).abs().max()) > 2
    stored = caches[0].pool.slab(caches[0].runtime.form(caches[0].model, 0))[0]
    coordinates = caches[0].runtime.form(caches[0].model, 0).view(stored[None], "keys")
    torch.testing.assert_close(coordinates.abs(), torch.full((1, 1, 16), 5.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("part", [LowRank, UnrotatedLowRank])
def test_axes_of_a_calibration_serve_all_sequences(part):
    """Two texts along a calibration text's eight directions come back from axes that are held and counted once."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(1, 2, 8, 32, generator=generator)

    def text(tokens, batch=1):
        keys = torch.randn(batch, 2, tokens, 8, generator=generator) @ directions
        return MODEL.layers[0].rotary.apply(keys, torch.arange(tokens)) if part is UnrotatedLowRank else keys

    calibrating = read(pikv.compose(MODEL), text(200))
    (compressor,) = part.calibrated([calibrating.view(0)], rank=8)
    assert compressor == attrs.evolve(compressor, axes=Axes(compressor.axes.columns.clone()))
    cache = pikv.compose(MODEL, compressor=[compressor], page_size=16, tail_tokens=16)
    k = text(160, batch=2)
    torch.testing.assert_close(read(cache, k).retrieve(0).keys, k, atol=1e-3, rtol=1e-3)
    held = cache.stored_bytes()
    assert held.bases == 2 * 32 * 8 * 4
    assert held.pages == 2 * 2 * 9 * 16 * 4 * (8 + 32 + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pages_of_every_dtype_are_sealed(dtype):
    """By the installed backends: keys are coordinates in float32 by then, and values are as the model has them."""
    model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=32, dtype=dtype)
    cache = pikv.compose(model, compressor=LowRank(rank=32, inner=Int8()), page_size=16, tail_tokens=16)
    k, v = torch.randn(2, 1, 2, 160, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    cache.update(0, 0, k, v)
    cache.finish_prefill()
    context = cache.retrieve(0)
    torch.testing.assert_close(context.keys, k, atol=0.1, rtol=0)
    torch.testing.assert_close(context.values, v, atol=0.05, rtol=0)


def test_axes_leave_out_what_is_no_token():
    """Past a row's end there may be anything."""
    keys = torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).repeat(2, 2, 1)
    positions[1, 0, 5:] = -1
    there = positions >= 0
    assert Axes.of(keys.masked_fill(~there[..., None], 1e3), positions) == Axes.of(
        keys.masked_fill(~there[..., None], 0), positions
    )


@pytest.mark.parametrize(("name", "part"), [("low_rank", LowRank), ("low_rank_unrotated", UnrotatedLowRank)])
def test_by_name(name, part, tmp_path):
    """The names take a rank, an inner compressor by its own name, and a file with the axes of all layers."""
    names = {"compressor": {"name": name, "rank": 8, "inner": "int8"}}
    assert pikv.runtime_from(names, MODEL).compressor == part(rank=8, inner=Int8())
    axes = Axes.of(torch.randn(1, 2, 50, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 2, 50))
    save_axes([axes], tmp_path / "axes.pt")
    assert load_axes(tmp_path / "axes.pt") == (axes,)
    names = {"compressor": {"name": name, "rank": 8, "axes": str(tmp_path / "axes.pt")}}
    assert pikv.runtime_from(names, MODEL).compressor == (part(rank=8, axes=axes),)


def test_a_file_without_axes_is_refused(tmp_path):
    """One that is not there, that torch cannot read, or that holds something else."""
    torch.save({"axes": 1}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    for name, message in (("none.pt", "cannot be read"), ("text.pt", "cannot be read"), ("other.pt", "a list of ten")):
        with pytest.raises(pikv.ConfigError, match=message):
            load_axes(tmp_path / name)
