"""Key codes: what a page's index holds, by hand, and pages read by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import pikv
from pikv.core.exact import Exact
from pikv.core.ports import MassSelector, PageIndex
from pikv.policies import KeyCodes, Quest
from pikv.testing.page_selector import MassSelectorConformance


class TestTwoBits(MassSelectorConformance):
    """The shipped suite."""

    def make(self) -> MassSelector:
        return KeyCodes(mass=0.9)


class TestFourBits(MassSelectorConformance):
    """The shipped suite, of estimates that are nearer."""

    tolerance = 0.05

    def make(self) -> MassSelector:
        return KeyCodes(bits=4)


class TestOneBit(MassSelectorConformance):
    """The shipped suite."""

    tolerance = 0.6

    def make(self) -> MassSelector:
        return KeyCodes(bits=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3},
        {"bits": 8},
        {"pages": 0},
        {"min_pages": 0},
        {"pages": 3, "min_pages": 4},
        {"dense_layers": -1},
        {"mass": 0.0},
        {"mass": 1.5},
    ],
)
def test_settings_that_cannot_be(settings):
    """They are refused when the selector is made."""
    with pytest.raises(pikv.ConfigError):
        KeyCodes(**settings)


def layer_of(key_dim):
    return pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=key_dim, value_dim=16, scale=1.0)


def indexed(selector, keys):
    """The index of pages of keys [n, page_size, key_dim]."""
    form = selector.index_form(layer_of(keys.shape[-1]), keys.shape[1])
    out = torch.full((len(keys), *form.shape), 255, dtype=form.dtype)
    selector.index(keys, out)
    return out


def test_an_index_by_hand():
    """Two bits, 5 channels: scale and zero of each, then the codes in words, channels past the fifth 0."""
    keys = torch.zeros(1, 16, 5)
    keys[0, :4, 0] = torch.tensor([-1.0, 0.0, 1.0, 2.0])  # zero -1, scale 1: codes 0, 1, 2, 3, then 1
    keys[0, :3, 4] = torch.tensor([6.0, 3.9, 2.1])  # zero 0, scale 2: codes 3, 2, 1, then 0
    out = indexed(KeyCodes(bits=2), keys)[0]
    assert len(out) == 4 * 5 + 4 * 16
    assert out[:10].view(torch.float16).tolist() == [1.0, 0.0, 0.0, 0.0, 2.0]
    assert out[10:20].view(torch.float16).tolist() == [-1.0, 0.0, 0.0, 0.0, 0.0]
    words = out[20:].view(16, 4)
    assert words[:5].tolist() == [
        [0 | 3 << 2, 0, 0, 0],
        [1 | 2 << 2, 0, 0, 0],
        [2 | 1 << 2, 0, 0, 0],
        [3, 0, 0, 0],
        [1] + [0] * 3,
    ]


def test_one_bit_by_hand():
    """The levels are the means above and below the mean: of 0, 0, 1, 7 and 8, whose mean is 3.2, these are 1/3, 7.5."""
    keys = torch.tensor([0.0, 0.0, 1.0, 7.0, 8.0]).view(1, 5, 1)
    out = indexed(KeyCodes(bits=1), keys)[0]
    scale, zero = out[:4].view(torch.float16).tolist()
    assert zero == pytest.approx(1 / 3, abs=1e-3)
    assert zero + scale == pytest.approx(7.5, abs=5e-3)
    assert out[4:].view(5, 4)[:, 0].tolist() == [0, 0, 0, 1, 1]


def test_log_mass_by_hand():
    """A page whose keys the codes hold exactly: the log of the sum of exp(q.k), with and without a softcap."""
    keys = torch.tensor([[0.0, 3.0], [1.0, 3.0], [2.0, 3.0], [3.0, 3.0]])[None]
    query = torch.tensor([[1.0, 0.5], [-2.0, 0.0]]).view(1, 1, 2, 2)
    arrays = indexed(KeyCodes(bits=2), keys).view(1, 1, 1, -1)
    index = PageIndex(arrays=arrays, present=torch.ones(1, 1, 1).bool(), layer=layer_of(2))
    scores = torch.tensor([[1.5, 2.5, 3.5, 4.5], [0.0, -2.0, -4.0, -6.0]])
    torch.testing.assert_close(KeyCodes().log_mass(index, query)[0, 0, :, 0], scores.logsumexp(-1))


@pytest.mark.property
@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from([1, 2, 4]),
    key_dim=st.sampled_from([1, 3, 16, 40]),
    magnitude=st.sampled_from([1e-9, 1.0, 300.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_codes_are_of_the_nearest_level(seed, bits, key_dim, magnitude, dtype):
    """The mass is that of keys which are, channel by channel, the nearest of the levels that scale and zero make."""
    generator = torch.Generator().manual_seed(seed)
    keys = (torch.randn(2, 16, key_dim, generator=generator) * magnitude).clamp(-6e4, 6e4).to(dtype)
    selector = KeyCodes(bits=bits)
    arrays = indexed(selector, keys)
    scale, zero = arrays[:, : 4 * key_dim].contiguous().view(torch.float16).float().split(key_dim, dim=1)
    levels = zero[:, None, :, None] + scale[:, None, :, None] * torch.arange(1 << bits)
    away = (keys.float()[..., None] - levels).abs()
    nearer, next_nearer = away.topk(2, largest=False).values.unbind(-1)
    assume(bool((next_nearer - nearer > 1e-4 * scale[:, None]).all()))  # midway between two either is the nearest
    place = away.argmin(-1, keepdim=True)
    nearest = levels.expand(-1, 16, -1, -1).gather(-1, place)[..., 0]
    index = PageIndex(arrays=arrays.view(1, 1, 2, -1), present=torch.ones(1, 1, 2).bool(), layer=layer_of(key_dim))
    query = torch.randn(1, 1, 3, key_dim, generator=generator)
    torch.testing.assert_close(
        selector.log_mass(index, query)[0, 0],
        torch.einsum("gd,npd->gnp", query[0, 0], nearest).logsumexp(-1),
        atol=1e-4 * max(1.0, magnitude),
        rtol=0,
    )


def test_the_right_page_is_read_where_bounds_mislead():
    """A page of mixed keys has wide bounds and little mass; the page that answers has one key that does.

    Of 60 pages of 16 tokens 3 are read: KeyCodes finds the answer, and Quest takes pages whose bounds are wider.
    """
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 1, 1, 1000, 64, generator=generator)
    k[0, 0, :320] *= 2.0
    q = torch.randn(1, 1, 1, 64, generator=generator)
    k[0, 0, 500] = 2.2 * q[0, 0]
    answers = []
    for selector in (KeyCodes(pages=3, mass=None), Quest(pages=3, dense_layers=0)):
        model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=64)
        cache = pikv.PiKVCache(model, pikv.RuntimeConfig(page_selector=selector, page_size=16, tail_tokens=16))
        cache.update(0, 0, k, v)
        cache.attend(0, torch.zeros(1, 1, 1000, 64))
        cache.update(0, 1000, torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 64))
        answers.append(cache.attend(0, 2 * q)[0, 0, 0])
    torch.testing.assert_close(answers[0], v[0, 0, 500], atol=0.05, rtol=0)
    assert (answers[1] - v[0, 0, 500]).abs().max() > 0.5


def test_reads_by_mass_adapt():
    """A query that looks at one place reads few pages, one that looks nowhere reads as many as there may be."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=32)
    runtime = pikv.runtime_from(
        {"page_selector": {"name": "key_codes", "bits": 4, "pages": 40, "mass": 0.9, "min_pages": 2}, "page_size": 16},
        model,
    )
    generator, pages = torch.Generator().manual_seed(2), []
    k, v = torch.randn(2, 1, 1, 1200, 32, generator=generator)
    for sharpness in (0.0, 20.0):
        cache = pikv.PiKVCache(model, runtime)
        cache.update(0, 0, k, v)
        cache.attend(0, torch.zeros(1, 2, 1200, 32))
        with cache.auditing_reads():
            cache.update(0, 1200, k[:, :, :1], v[:, :, :1])
            cache.attend(0, sharpness * k[:, :, 300:301].expand(1, 2, 1, 32))
        reads = cache.page_reads().layers[0]
        pages.append(reads.pages)
        assert reads.left_out == pytest.approx(reads.true_left_out, abs=0.02)
    assert pages == [40, 2]


def test_index_bytes_are_counted():
    """stored_bytes counts codes, scales and zeros."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=32)
    cache = pikv.compose(model, page_selector=KeyCodes(), compressor=Exact(), page_size=16, tail_tokens=16)
    k, v = torch.randn(2, 1, 1, 160, 32)
    cache.update(0, 0, k, v)
    cache.finish_prefill()
    assert cache.stored_bytes().indexes == 9 * (4 * 32 + 16 * 32 // 4)
