"""Pages in a basis that is fitted to each sequence: what a cache holds, and answers, through anything done to it."""

from __future__ import annotations

from typing import final

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.core import attention
from pikv.core.basis import Basis
from pikv.core.exact import Exact
from pikv.core.ports import Backend, BasisCompressor, Compressor, StepKernel, UnrotatedCompressor
from pikv.core.tail import EMPTY
from pikv.core.torch_backend import TorchBackend
from pikv.policies import Quest, Recent, Uniform
from pikv.testing import strategies as some
from pikv.testing.plain import PlainCache

MODEL = pikv.ModelConfig.of(
    [
        pikv.LayerConfig(query_heads=4, kv_heads=2, key_dim=8, value_dim=4, rotary=pikv.Rotary.of(dim=8)),
        pikv.LayerConfig(query_heads=2, kv_heads=1, key_dim=6, value_dim=4, window=29, rotary=pikv.Rotary.of(dim=4)),
    ]
)


@final
@attrs.frozen
class Fitted(BasisCompressor):
    """The principal axes of each row's keys, all of them or the first few; values stay as they are, or turn too."""

    inner: Compressor = attrs.field(factory=Exact)
    rank: int | None = None
    turns_values: bool = False

    def stored(self, layer):
        return layer if self.rank is None else attrs.evolve(layer, key_dim=self.rank)

    def fit(self, layer, keys, values, held):
        keys, values = (states.masked_fill(~held[..., None], 0) for states in (keys, values))
        columns = torch.linalg.eigh(keys.mT @ keys).eigenvectors.flip(-1)[..., : self.rank].clone()
        return Basis(columns, torch.linalg.eigh(values.mT @ values).eigenvectors if self.turns_values else None)


@final
@attrs.frozen
class Unrotated(UnrotatedCompressor):
    """The principal axes of keys before rotary embedding."""

    inner: Compressor = attrs.field(factory=Exact)
    rank: int | None = None

    def stored(self, layer):
        return Fitted(rank=self.rank).stored(layer)

    def fit(self, layer, keys, values, held):
        return Fitted(rank=self.rank).fit(layer, keys, values, held)


@final
@attrs.frozen
class OfEachHead(BasisCompressor):
    """A rotation for each KV head, the same for all sequences."""

    inner: Compressor = attrs.field(factory=Exact)

    def stored(self, layer):
        return layer

    def fit(self, layer, keys, values, held):
        generator = torch.Generator().manual_seed(layer.key_dim)
        return Basis(torch.linalg.qr(torch.randn(layer.kv_heads, *2 * [layer.key_dim], generator=generator)).Q)


@final
@attrs.frozen
class Turned(BasisCompressor):
    """The same rotation for all sequences and heads."""

    inner: Compressor = attrs.field(factory=Exact)

    def stored(self, layer):
        return layer

    def fit(self, layer, keys, values, held):
        generator = torch.Generator().manual_seed(layer.key_dim)
        return Basis(
            *(torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (keys.shape[-1], values.shape[-1]))
        )


@final
@attrs.frozen
class Together(TorchBackend):
    """The torch backend, whose kernel takes the tail along."""

    def attend(self, codec, device):
        return TogetherKernel(super().attend(codec, device), codec.layer)


@final
@attrs.frozen
class TogetherKernel(StepKernel):
    pages: object
    layer: pikv.LayerConfig

    def __call__(self, query, pages, *, oldest=None, page_lse=None):
        assert pages.basis is None
        return self.pages(query, pages, oldest=oldest, page_lse=page_lse)

    def step(self, query, pages, tail, *, oldest=None):
        mask = (tail.positions != EMPTY)[:, :, None]
        if oldest is not None:
            mask = mask & (tail.positions[:, :, None] >= oldest[:, None, :, None])
        part = attention.attend(query, tail.keys, tail.values, scale=self.layer.scale, mask=mask)
        return part if pages is None else attention.merge([part, self(query, pages, oldest=oldest)])


def random(generator, layer, batch, tokens):
    heads = ((layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim), (layer.query_heads, layer.key_dim))
    return [torch.randn(batch, n, tokens, dim, generator=generator) for n, dim in heads]


def check_near(cache, plain):
    """What the cache holds is what was put in, to rounding."""
    for layer_id, rows in plain.rows.items():
        context = cache.retrieve(layer_id)
        for sequence, row in enumerate(rows):
            for head in range(plain.model.layers[layer_id].kv_heads):
                there = context.mask[sequence, head]
                wanted = torch.isin(row.positions, context.positions[sequence, head, there].long())
                for got, put in ((context.keys, row.keys), (context.values, row.values)):
                    torch.testing.assert_close(got[sequence, head, there], put[head, wanted], atol=1e-5, rtol=1e-5)


@pytest.mark.property
@given(
    backend=st.sampled_from([TorchBackend(), Together()]),
    compressor=st.sampled_from([Fitted(), Fitted(turns_values=True), Turned(), OfEachHead(), Unrotated()]),
    sizes=some.runtime_configs(),
    data=st.data(),
    generator=some.generators(),
)
def test_a_basis_follows_its_sequence(backend, compressor, sizes, data, generator):
    """Updates, answers, forks, beams, joins with other texts, drops and crops: all as with exact pages, to rounding."""
    runtime = attrs.evolve(sizes, compressor=compressor, backends=[backend])
    pool = pikv.PagePool(MODEL, runtime)
    pairs = [(pikv.PiKVCache(MODEL, runtime, pool=pool), PlainCache(MODEL)) for _ in range(2)]
    for _ in range(data.draw(st.integers(1, 6))):
        cache, plain = pairs[data.draw(st.integers(0, 1))]
        does = data.draw(st.sampled_from(["update", "update", "update", "reorder", "join", "drop", "crop"]))
        if does == "update":
            batch = plain.sequences or data.draw(st.integers(1, 2))
            tokens = data.draw(st.integers(1, 150) | st.just(1))
            positions = data.draw(some.positions(batch, tokens, after=plain.last() if plain.sequences else None))
            for layer_id, layer in enumerate(MODEL.layers):
                k, v, q = random(generator, layer, batch, tokens)
                cache.update(layer_id, positions, k, v)
                plain.update(layer_id, positions, k, v)
                wanted = plain.attend(layer_id, q, positions)
                torch.testing.assert_close(cache.attend(layer_id, q).double(), wanted, atol=1e-4, rtol=1e-4)
        elif does == "reorder" and plain.sequences:
            ids = data.draw(st.lists(st.integers(0, plain.sequences - 1), min_size=1, max_size=3))
            cache.reorder(ids)
            plain.reorder(ids)
        elif does == "join" and all(each.sequences for _, each in pairs) and pairs[0][1].sequences < 4:
            other = pairs[1] if cache is pairs[0][0] else pairs[0]
            cache.join(other[0])
            plain.join(other[1])
        elif does == "drop" and plain.sequences > 1:
            cache.drop([0])
            plain.drop([0])
        elif does == "crop" and plain.sequences and not any(row.last > 28 for row in plain.rows[1]):
            cache.crop(9)
            plain.crop([9] * plain.sequences)
        check_near(cache, plain)
        pool.check_integrity()


def test_a_sequence_keeps_its_basis_while_it_has_pages():
    """A second one, joined before its first page, gets its own when it seals; a cache that lets all go gets another."""
    runtime = pikv.RuntimeConfig(compressor=Fitted(rank=3), page_size=16, tail_tokens=16)
    pool = pikv.PagePool(MODEL, runtime)
    caches = [pikv.PiKVCache(MODEL, runtime, pool=pool) for _ in range(2)]
    generator, layer = torch.Generator().manual_seed(0), MODEL.layers[0]
    for cache, tokens in zip(caches, (64, 20), strict=True):
        cache.update(0, 0, *random(generator, layer, 1, tokens)[:2])
        cache.finish_prefill()
    sealed = caches[0].retrieve(0).keys[0, :, :48]
    caches[0].join(caches[1])
    k, v, _ = random(generator, layer, 2, 40)
    k[1, ..., 3:] = 0  # three channels, but for what came before
    k[1] *= 1e3
    caches[0].update(0, torch.stack([torch.arange(64, 104), torch.arange(20, 60)]), k, v)
    caches[0].finish_prefill()
    context = caches[0].retrieve(0)
    assert torch.equal(context.keys[0, :, :48], sealed)
    torch.testing.assert_close(context.keys[1, :, 20:36], k[1, :, :16], atol=2.0, rtol=0.01)


@pytest.mark.parametrize(("compressor", "numbers"), [(Turned(), 8 * 8 + 4 * 4), (OfEachHead(), 2 * 8 * 8)], ids=repr)
def test_a_basis_of_all_is_held_once(compressor, numbers):
    """However many sequences join, whether or not they have pages; each is read back as it was put in."""
    runtime = pikv.RuntimeConfig(compressor=compressor, page_size=16, tail_tokens=16)
    pool, generator = pikv.PagePool(MODEL, runtime), torch.Generator().manual_seed(0)
    caches, layer = [pikv.PiKVCache(MODEL, runtime, pool=pool) for _ in range(2)], MODEL.layers[0]
    for cache, tokens in zip(caches, (64, 20), strict=True):
        cache.update(0, 0, *random(generator, layer, 1, tokens)[:2])
        cache.finish_prefill()
    held = caches[0].stored_bytes().bases
    assert held == numbers * 4
    caches[0].join(caches[1])
    k, v, _ = random(generator, layer, 2, 40)
    caches[0].update(0, torch.stack([torch.arange(64, 104), torch.arange(20, 60)]), k, v)
    caches[0].finish_prefill()
    assert caches[0].stored_bytes().bases == held
    torch.testing.assert_close(caches[0].retrieve(0).keys[1, :, 20:60], k[1], atol=1e-5, rtol=1e-5)


def test_bytes_of_bases_are_counted():
    """[sequences, kv_heads, key_dim, rank] float32 in each layer that has pages; pages hold `rank` channels of keys."""
    cache = pikv.PiKVCache(MODEL, pikv.RuntimeConfig(compressor=Fitted(rank=2), page_size=16, tail_tokens=16))
    generator = torch.Generator().manual_seed(0)
    for layer_id, layer in enumerate(MODEL.layers):
        cache.update(layer_id, 0, *random(generator, layer, 3, 40)[:2])
    assert cache.stored_bytes().bases == 0
    cache.finish_prefill()
    held = cache.stored_bytes()
    assert held.bases == 3 * (2 * 8 + 1 * 6) * 2 * 4
    assert held.pages == 3 * 3 * 16 * (2 + 4 + 1) * 4
    assert held.total == held.pages + held.tail + held.tables + held.bases


@pytest.mark.parametrize("compressor", [Fitted(rank=3), Turned(), OfEachHead()], ids=repr)
def test_fewer_coordinates_answer_as_what_is_read_back(compressor):
    """With a budget, a page selector, and a kernel that would take a tail if its dimensions were the layer's."""
    runtime = pikv.RuntimeConfig(
        compressor=compressor,
        page_selector=Quest(pages=2, dense_layers=0),
        token_selector=Recent(sinks=4, recent=16),
        allocator=Uniform(),
        budget_tokens=64,
        page_size=16,
        tail_tokens=16,
        backends=[Together()],
    )
    model = pikv.ModelConfig.of([MODEL.layers[0]])
    cache, generator = pikv.PiKVCache(model, runtime), torch.Generator().manual_seed(0)
    k, v, q = random(generator, model.layers[0], 2, 100)
    cache.update(0, 0, k, v)
    cache.attend(0, q)
    cache.finish_prefill()
    cache.update(0, 100, k[:, :, :1], v[:, :, :1])
    cache.attend(0, q[:, :, :1])  # chooses pages by keys as they are read back
    context = cache.retrieve(0)
    sealed = context.keys[0, 0, :16]
    assert int(torch.linalg.matrix_rank(sealed, rtol=1e-4)) == cache.runtime.form(MODEL, 0).field("keys").shape[0]
    dense = attrs.evolve(runtime, page_selector=None)
    plain = pikv.PiKVCache(model, dense)
    plain.update(0, 0, k, v)
    plain.attend(0, q)
    plain.finish_prefill()
    plain.update(0, 100, k[:, :, :1], v[:, :, :1])
    context = plain.retrieve(0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, :1], context.keys, context.values, enable_gqa=True
    )
    torch.testing.assert_close(plain.attend(0, q[:, :, :1]), expected, atol=1e-5, rtol=1e-5)


def test_a_backend_without_a_kernel_for_the_inner_pages_is_passed_over():
    """As for pages without a basis: the next one is asked."""

    @attrs.frozen
    class Nothing(TorchBackend):
        def attend(self, codec, device):
            return None

        def seal(self, codec, selector, device):
            return None

    runtime = pikv.RuntimeConfig(compressor=Fitted(), backends=[Nothing(), TorchBackend()])
    steps = pikv.PiKVCache(MODEL, runtime).describe().steps
    assert all(text.startswith("torch") for text in steps.values())
    with pytest.raises(pikv.ConfigError, match="none of the backends"):
        pikv.PiKVCache(MODEL, attrs.evolve(runtime, backends=[Nothing()]))


def test_keys_before_rotation_are_fitted_written_and_indexed():
    """Keys along two directions before rotation come back from two coordinates, and pages are chosen by them rotated.

    The same keys after rotation lie along more than two.
    """
    layer = MODEL.layers[0]
    settings = {"page_size": 16, "tail_tokens": 16, "page_selector": Quest(pages=2, dense_layers=0)}
    model, generator = pikv.ModelConfig.of([layer]), torch.Generator().manual_seed(0)
    plain = torch.randn(1, 2, 112, 2, generator=generator) @ torch.randn(1, 2, 2, 8, generator=generator)
    k, v = layer.rotary.apply(plain, torch.arange(112)), torch.randn(1, 2, 112, 4, generator=generator)
    lost, answers = [], []
    for compressor in (Unrotated(rank=2), Fitted(rank=2), Exact()):
        cache = pikv.PiKVCache(model, pikv.RuntimeConfig(compressor=compressor, **settings))
        cache.update(0, 0, k, v)
        cache.finish_prefill()
        lost.append(float((cache.retrieve(0).keys - k).abs().max()))
        cache.update(0, 112, k[:, :, 40:41], v[:, :, 40:41])
        answers.append(cache.attend(0, 3 * k[:, [0, 0, 1, 1], 40:41]))
    assert lost[0] < 1e-4 < 0.5 < lost[1]
    torch.testing.assert_close(answers[0], answers[2], atol=1e-4, rtol=1e-4)


def test_keys_before_rotation_are_decoded_by_torch_alone():
    """A kernel that would take them for keys is not asked, and a model whose rotary is unknown is refused."""

    @attrs.frozen
    class Other(Backend):
        @property
        def name(self):
            return "other"

        def attend(self, codec, device):
            raise AssertionError("asked for a kernel that takes coordinates for keys")

        def choose(self, selector, codec, device):
            return None

        def seal(self, codec, selector, device):
            return None

    runtime = pikv.RuntimeConfig(compressor=Unrotated(), backends=[Other(), TorchBackend()])
    steps = pikv.PiKVCache(MODEL, runtime).describe().steps
    assert all(text.startswith("torch") for text in steps.values())
    unknown = pikv.ModelConfig.of([attrs.evolve(MODEL.layers[0], rotary=None)])
    with pytest.raises(pikv.ConfigError, match=r"layer 0 has no rotary.*Unrotated needs to un-rotate keys"):
        pikv.PiKVCache(unknown, pikv.RuntimeConfig(compressor=Unrotated()))
