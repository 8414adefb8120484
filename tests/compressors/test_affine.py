from __future__ import annotations

import itertools
import re
import struct
from bisect import bisect_left, bisect_right
from fractions import Fraction
from typing import final

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.adapters.compressors import Int2, Int4, Int8
from pikv.core.config import DTYPES
from pikv.core.exact import Exact
from pikv.core.forms import Affine, KeyPrefix
from pikv.core.ports import Compressor
from pikv.core.runtime import PAGE_SIZES
from pikv.testing.compressor import CompressorConformance

COMPRESSORS = {8: Int8(), 4: Int4(), 2: Int2()}
FLOAT32_EPS = 2.0**-23
HIGHEST_CODE = {Int8(): 255, Int4(): 15, Int2(): 3}


def layer_of(key_dim, value_dim, values="stored"):
    return pikv.LayerConfig(query_heads=1, kv_heads=1, key_dim=key_dim, value_dim=value_dim, values=values)


def sides_of(form):
    """The sides that have codes of their own."""
    return ["keys"] if isinstance(form.values, KeyPrefix) else ["keys", "values"]


def scales_and_zeros(form, pages, side):
    """Of every entry, as the caller sees them: float64 [n, page_size, dim]."""
    encoding = getattr(form, side)
    for name in (f"{side[:-1]}_scales", f"{side[:-1]}_zeros"):
        spread = form.view(pages, name).double().repeat_interleave(encoding.group, dim=1)
        yield spread if side == "keys" else spread.mT  # [n, page_size, key_dim]; [n, value_dim, page_size]


def half_a_scale(form, pages, states, decoded, side):
    """The bound that the compressors promise."""
    scales, _ = scales_and_zeros(form, pages, side if side in sides_of(form) else "keys")
    scales = scales[..., : states.shape[-1]]
    return scales / 2 + FLOAT32_EPS * torch.maximum(states.abs(), decoded.abs())


class AffineConformance(CompressorConformance):
    def error_bound(self, form, pages, states, decoded, side):
        return half_a_scale(form, pages, states, decoded, side)


class TestInt8(AffineConformance):
    def make(self) -> Compressor:
        return Int8()

    def layers(self):
        return [*super().layers(), layer_of(1, 1), layer_of(7, 37)]


class TestInt4(AffineConformance):
    def make(self) -> Compressor:
        return Int4()

    def layers(self):
        return [*super().layers(), layer_of(1, 2), layer_of(7, 34)]


class TestInt2(AffineConformance):
    def make(self) -> Compressor:
        return Int2()

    def layers(self):
        return [*super().layers(), layer_of(1, 4), layer_of(7, 120)]


# --- the bound


@st.composite
def hard_states(draw, entries, dim, dtype):
    """[2, entries, dim] of any magnitude that float16 holds, with an offset, outlier channels and constant groups."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    states = torch.randn(2, entries, dim, generator=generator, dtype=torch.float64)
    limit = 65280.0 if dtype == torch.bfloat16 else 65504.0  # the largest that float16 holds, too
    states = states * 10.0 ** draw(st.integers(-9, 4)) + draw(st.sampled_from([0.0, 1e-6, -3.0, 1000.0, -60_000.0]))
    outlier = draw(st.integers(0, dim - 1))
    states[..., outlier] *= draw(st.sampled_from([1.0, 0.0, -0.0, 100.0, 1e5]))
    if draw(st.booleans()):
        states[:, :, -1] = draw(st.sampled_from([0.0, 0.1, -1e-9, limit, -limit]))  # a group of keys
        states[:, -1, :] = draw(st.sampled_from([0.0, 0.1, 1e-9, limit, -limit]))  # a group of values
    return states.clamp(-limit, limit).to(dtype)


@st.composite
def hard_pages(draw):
    """A compressor, a form, keys and values."""
    bits = draw(st.sampled_from(sorted(COMPRESSORS)))
    layer = layer_of(draw(st.integers(1, 40)), draw(st.integers(1, 20)) * (8 // bits))
    if draw(st.booleans()):
        layer = layer_of(layer.key_dim, draw(st.integers(1, layer.key_dim)), "key_prefix")
    page_size, dtype = draw(st.sampled_from(PAGE_SIZES)), draw(st.sampled_from(DTYPES))
    form = COMPRESSORS[bits].form(layer, page_size=page_size, dtype=dtype)
    keys = draw(hard_states(page_size, layer.key_dim, dtype))
    if layer.values == "key_prefix":
        return COMPRESSORS[bits], form, keys, keys[..., : layer.value_dim]
    return COMPRESSORS[bits], form, keys, draw(hard_states(page_size, layer.value_dim, dtype))


def encode(compressor, form, keys, values):
    pages = torch.full((len(keys), form.stride), 0xA5, dtype=torch.uint8)
    positions = torch.arange(len(keys) * form.page_size, dtype=torch.int32).view(len(keys), -1)
    compressor.encode(form, keys, values, positions, pages)
    return pages


@pytest.mark.property
@given(hard_pages())
def test_error_is_at_most_half_a_scale(case):
    """Whatever the entries, decoding gives each back to half its group's scale and one float32 rounding."""
    compressor, form, keys, values = case
    pages = encode(compressor, form, keys, values)
    for side, states, decoded in zip(("keys", "values"), (keys, values), compressor.decode(form, pages), strict=True):
        assert decoded.dtype == torch.float32
        error, states, decoded = (states.double() - decoded.double()).abs(), states.double(), decoded.double()
        assert bool((error <= half_a_scale(form, pages, states, decoded, side)).all())


@pytest.mark.property
@given(hard_pages())
def test_scales_are_no_larger_than_float16_makes_them(case):
    """A scale exceeds (max - min) / (2**bits - 1) only by the rounding of the zero and of itself."""
    compressor, form, keys, values = case
    pages = encode(compressor, form, keys, values)
    for side in sides_of(form):
        states = keys if side == "keys" else values
        encoding, axis = getattr(form, side), 1 if side == "keys" else 2
        grouped = states.double().unflatten(axis, (-1, encoding.group))
        low, high = grouped.amin(axis + 1), grouped.amax(axis + 1)
        zero_slack = 2.0**-10 * low.abs() + 2.0**-24
        largest = (high - low + zero_slack) / HIGHEST_CODE[compressor] * (1 + 2.0**-10) + 2.0**-24
        scales = form.view(pages, f"{side[:-1]}_scales").double()
        assert bool(((scales if side == "keys" else scales.mT) <= largest).all())


def test_a_constant_group_comes_back_exactly():
    """A group of one float16 number has scale 0 and decodes to that number; -0.0 is stored as 0.0."""
    for compressor in COMPRESSORS.values():
        form = compressor.form(layer_of(8, 8), page_size=16, dtype=torch.float32)
        for number in (0.0, -0.0, 0.25, -3.0, 65504.0, -65504.0):
            states = torch.full((1, 16, 8), number)
            pages = encode(compressor, form, states, states)
            assert not bool(form.view(pages, "key_scales").any() | form.view(pages, "value_scales").any())
            zeros = form.view(pages, "key_zeros")
            assert not bool((zeros.eq(0) & zeros.signbit()).any())
            assert all(torch.equal(decoded, states) for decoded in compressor.decode(form, pages))


def test_a_near_tie_goes_to_the_nearer_code():
    """An entry 2**-30 below the middle of two codes gets the lower one, though float32 would round it to the middle."""
    entry = -(2.0**-8) - 2.0**-30
    states = torch.tensor([-1.0, -1.0 + 255 / 128, *[entry] * 30]).view(1, 32, 1)  # zero -1, scale 2**-7
    form = Int8().form(layer_of(1, 1), page_size=32, dtype=torch.float32)
    keys, _ = Int8().decode(form, encode(Int8(), form, states, states))
    assert keys.flatten().tolist() == [-1.0, -1.0 + 255 / 128, *[-(2.0**-7)] * 30]


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=repr)
@pytest.mark.parametrize("number", [65536.0, -1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_what_float16_cannot_hold_is_refused(compressor, number, side):
    """What float16 cannot hold raises, naming the side, the magnitude and what to do; nothing is written."""
    form = compressor.form(layer_of(8, 8), page_size=16, dtype=torch.float32)
    states = {"keys": torch.zeros(2, 16, 8), "values": torch.zeros(2, 16, 8)}
    states[side][1, 3, 5] = number
    pages = torch.full((2, form.stride), 0xA5, dtype=torch.uint8)
    message = rf"^{side} must lie within float16's range.*magnitude of {re.escape(f'{abs(number):.6g}')};.*Exact$"
    with pytest.raises(pikv.InputError, match=message):
        compressor.encode(form, **states, positions=torch.zeros(2, 16, dtype=torch.int32), out=pages)
    assert bool((pages == 0xA5).all())


# --- the bytes


def page_by_hand(form, keys, values, positions):
    """One page, written from the docstring of Affine in plain Python: keys [P][D], values [P][D] -> bytes."""
    page = bytearray(form.stride)
    fields = {field.name: field for field in form.fields}

    def put(name, index, kind, number):
        (shape, offset), width = (fields[name].shape, fields[name].offset), struct.calcsize(kind)
        flat = 0
        for size, place in zip(shape, index, strict=True):
            flat = flat * size + place
        for i, byte in enumerate(struct.pack(f"<{kind}", number)):
            page[offset + flat * width + i] |= byte

    for side, rows in (("key", list(zip(*keys, strict=True))), ("value", values)):
        if f"{side}s" not in sides_of(form):
            continue
        encoding = getattr(form, f"{side}s")
        for row, entries in enumerate(rows):
            for start in range(0, len(entries), encoding.group):
                group = start // encoding.group
                zero, scale, codes = group_by_hand(entries[start : start + encoding.group], encoding.bits)
                put(f"{side}_zeros", (group, row), "e", float(zero))
                put(f"{side}_scales", (group, row), "e", float(scale))
                for i, code in enumerate(codes, start=start):
                    index, shift = place_of_code(encoding, row, i)
                    put(f"{side}s", index, "B", code << shift)
    for slot, position in enumerate(positions):
        put("positions", (slot,), "i", position)
    return list(page)


def place_of_code(encoding, row, entry):
    """Index of the byte that holds a code, in the field of codes, and how far up it stands there."""
    if encoding.order == "plain":
        per = 8 // encoding.bits
        return (row, entry // per), entry % per * encoding.bits
    per = 32 // encoding.bits
    return (row // per, entry, row % 4), row % per // 4 * encoding.bits


def code_at(packed, encoding, row, entry):
    index, shift = place_of_code(encoding, row, entry)
    return int(packed[index]) >> shift & encoding.highest_code


FINITE = (pattern for pattern in range(1 << 16) if pattern & 0x7C00 != 0x7C00)
HALVES = sorted({Fraction(struct.unpack("<e", struct.pack("<H", pattern))[0]) for pattern in FINITE})  # all float16


def group_by_hand(members, bits):
    """Zero, scale and codes of a group in exact fractions."""
    members = [Fraction(member) for member in members]
    zero = HALVES[bisect_right(HALVES, min(members)) - 1]
    scale = HALVES[bisect_left(HALVES, (max(members) - zero) / (2**bits - 1))]
    return zero, scale, [round((member - zero) / scale) if scale else 0 for member in members]


@st.composite
def small_pages(draw):
    """Small forms; entries with few bits, so that ties are common and float64 holds all differences."""
    bits = draw(st.sampled_from(sorted(COMPRESSORS)))
    dims = draw(st.sampled_from([1, 3, 8, 16])), draw(st.sampled_from([4, 12, 36]))
    layer = layer_of(*dims) if dims[1] > dims[0] else layer_of(*dims, draw(st.sampled_from(["stored", "key_prefix"])))
    page_size = draw(st.sampled_from(PAGE_SIZES))
    form = COMPRESSORS[bits].form(layer, page_size=page_size, dtype=torch.float32)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    magnitude = draw(st.sampled_from([1, 7, 255, 30_000, 2**23]))
    exponent = draw(st.integers(-30, -8))

    def states(dim):
        whole = torch.randint(-magnitude, magnitude + 1, (page_size, dim), generator=generator)
        return (whole.double() * 2.0**exponent).float()

    keys, values = states(layer.key_dim), states(layer.value_dim)
    return COMPRESSORS[bits], form, keys, values if layer.values == "stored" else keys[:, : layer.value_dim]


@pytest.mark.property
@given(small_pages())
def test_a_page_has_the_bytes_that_its_form_describes(case):
    """Every byte, padding too, is what the docstring of Affine says, worked out entry by entry in exact fractions."""
    compressor, form, keys, values = case
    pages = encode(compressor, form, keys[None], values[None])
    assert pages[0].tolist() == page_by_hand(form, keys.tolist(), values.tolist(), range(form.page_size))


@pytest.mark.property
@given(small_pages())
def test_decode_rounds_once(case):
    """An entry decodes to code * scale + zero, rounded to float32 once; codes are read low bits first."""
    compressor, form, keys, values = case
    pages = encode(compressor, form, keys[None], values[None])
    keys, values = compressor.decode(form, pages)
    for side in sides_of(form):
        decoded = keys if side == "keys" else values
        encoding, packed = getattr(form, side), form.view(pages, side)[0]
        rows = decoded[0].mT if side == "keys" else decoded[0]
        codes = torch.tensor(
            [[code_at(packed, encoding, row, entry) for entry in range(rows.shape[1])] for row in range(len(rows))]
        )
        scales, zeros = scales_and_zeros(form, pages, side)
        exact = (codes.mT if side == "keys" else codes) * scales[0] + zeros[0]  # float64: nothing is rounded
        assert torch.equal(decoded[0], exact.float())


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=repr)
def test_bytes_do_not_depend_on_threads(compressor, two_threads):
    """Two threads encode a batch to the bytes that one makes."""
    form = compressor.form(layer_of(128, 128), page_size=64, dtype=torch.float32)
    keys, values = torch.randn(2, 32, 64, 128, generator=torch.Generator().manual_seed(0))
    pages = encode(compressor, form, keys, values)
    torch.set_num_threads(1)
    assert torch.equal(pages, encode(compressor, form, keys, values))


@pytest.mark.parametrize(("bits", "share"), [(8, 0.567), (4, 0.323), (2, 0.194)])
def test_bytes_of_a_page(bits, share):
    """At page_size 64 and head_dim 128 a page takes this share of the 33024 bytes of float16 entries and positions."""
    layer = layer_of(128, 128)
    exact = Exact().form(layer, page_size=64, dtype=torch.float16)
    form = COMPRESSORS[bits].form(layer, page_size=64, dtype=torch.float16)
    assert exact.stride == 33024
    assert form.stride <= share * exact.stride
    assert form.keys == Affine(bits, 32, "tokens", "words")
    assert form.values == Affine(bits, 32, "channels", "words")


@pytest.mark.parametrize(
    ("bits", "page_size", "value_dim", "groups"),
    [(4, 16, 128, (16, 32)), (8, 32, 80, (32, 20)), (4, 64, 34, (32, 2)), (2, 64, 120, (32, 24)), (8, 64, 37, (32, 1))],
)
def test_groups_divide_the_page_and_the_value_dim(bits, page_size, value_dim, groups):
    """Groups are the largest divisors up to 32 that fill whole bytes."""
    form = COMPRESSORS[bits].form(layer_of(128, value_dim), page_size=page_size, dtype=torch.float16)
    assert (form.keys.group, form.values.group) == groups


@pytest.mark.property
@given(hard_pages())
def test_values_that_are_a_prefix_of_the_keys_decode_as_the_keys_do(case):
    """They have no bytes; a page of such values has the bytes of one that stores the keys alone."""
    compressor, form, keys, values = case
    decoded_keys, decoded_values = compressor.decode(form, encode(compressor, form, keys, values))
    if isinstance(form.values, KeyPrefix):
        assert torch.equal(decoded_values, decoded_keys[..., : form.values.dim])
        assert not [field.name for field in form.fields if field.name.startswith("value")]


@pytest.mark.parametrize(("bits", "value_dim"), [(4, 63), (2, 30)])
def test_a_value_dim_that_does_not_fill_bytes_is_refused(bits, value_dim):
    """A model whose values cannot be packed is refused when the cache is composed, with the dimensions that work."""
    model = pikv.ModelConfig.of([layer_of(64, value_dim)])
    with pytest.raises(pikv.ConfigError, match=rf"value_dim must be a multiple of {8 // bits}.*got {value_dim}; use"):
        pikv.compose(model, compressor=COMPRESSORS[bits])


@pytest.mark.parametrize(
    ("settings", "message"),
    [((3, 32, "tokens"), "bits must be"), ((4, 3, "tokens"), "group must"), ((4, 32, "heads"), "axis must be")],
)
def test_an_encoding_that_cannot_be_is_refused(settings, message):
    """Affine checks its bits, its group and its axis."""
    with pytest.raises(pikv.ConfigError, match=message):
        Affine(*settings)


# --- through a cache


MODEL = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=24)


def tokens(model, batch, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = model.layers[0]
    shapes = ((layer.query_heads, layer.key_dim), (layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim))
    return [torch.randn(batch, heads, count, dim, generator=generator).to(model.dtype) for heads, dim in shapes]


def feed(cache, start, q, k, v):
    cache.update(0, start, k, v)
    return cache.attend(0, q)


@pytest.mark.parametrize("bits", sorted(COMPRESSORS))
def test_names_stand_for_the_compressors(bits):
    """The composer knows them as int8, int4 and int2."""
    assert pikv.runtime_from({"compressor": f"int{bits}"}, MODEL).compressor == COMPRESSORS[bits]


def test_int4_pages_and_tables_take_at_most_a_third_of_float16():
    """Measured in a cache of 4096 tokens at page_size 64 and head_dim 128, tables included, tail (128 tokens) not."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=2, head_dim=128, dtype=torch.float16)
    stored = {}
    for compressor in (Int4(), Exact()):
        cache = pikv.compose(model, compressor=compressor)
        feed(cache, 0, *tokens(model, 1, 4096))
        stored[compressor] = cache.stored_bytes()
        assert stored[compressor].pages == 2 * 62 * cache.runtime.form(model, 0).stride
    ours, exact = (stored[compressor].pages + stored[compressor].tables for compressor in (Int4(), Exact()))
    assert ours <= exact / 3


@pytest.mark.property
@given(bits=st.sampled_from(sorted(COMPRESSORS)), cuts=st.sets(st.integers(1, 199), max_size=12))
def test_pages_do_not_depend_on_the_chunks(bits, cuts):
    """When nothing is evicted, tokens seal to the same bytes, page for page, however they were cut into updates."""
    slabs = []
    for bounds in ([0, 200], [0, *sorted(cuts), 200]):
        cache = pikv.compose(MODEL, compressor=COMPRESSORS[bits], page_size=16, tail_tokens=20)
        for start, stop in itertools.pairwise(bounds):
            feed(cache, start, *(states[:, :, start:stop] for states in tokens(MODEL, 1, 200)))
        form = cache.runtime.form(MODEL, 0)
        used = cache.pool.used_bytes // form.stride
        assert used == 2 * ((200 - 20) // 16)
        slabs.append(cache.pool.slab(form)[:used].clone())  # a fresh pool fills from its first row, pages in order
    assert torch.equal(*slabs)


@pytest.mark.parametrize("bits", sorted(COMPRESSORS))
@pytest.mark.parametrize("chunk", [1, 40])
def test_attention_is_over_exactly_what_is_decoded(bits, chunk):
    """`attend` equals attention in float64 over the keys and values that `retrieve` gives, within 1e-5."""
    cache = pikv.compose(MODEL, compressor=COMPRESSORS[bits], page_size=32, tail_tokens=32)
    feed(cache, 0, *tokens(MODEL, 3, 300))
    q, k, v = tokens(MODEL, 3, chunk, seed=1)
    cache.update(0, 300, k, v)
    context = cache.retrieve(0)
    assert context.positions.shape[-1] == 300 + chunk
    seen = context.positions[:, :, None] <= torch.arange(300, 300 + chunk)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(),
        context.keys.double().repeat_interleave(2, dim=1),
        context.values.double().repeat_interleave(2, dim=1),
        attn_mask=seen.repeat_interleave(2, dim=1),
    )
    assert bool((cache.attend(0, q).double() - expected).abs().amax() <= 1e-5)
    sealed = cache.stored_bytes().pages // cache.runtime.form(MODEL, 0).stride
    assert sealed >= 3 * 2 * 8


@final
@attrs.frozen
class Counting(Compressor):
    """Another compressor, and the first channel of every key that it was given to encode."""

    inner: Compressor
    encoded: list[torch.Tensor] = attrs.field(factory=list, eq=False)

    def form(self, layer, *, page_size, dtype):
        return self.inner.form(layer, page_size=page_size, dtype=dtype)

    def encode(self, form, keys, values, positions, out):
        self.encoded.append(keys[..., 0].clone())
        self.inner.encode(form, keys, values, positions, out)

    def decode(self, form, pages):
        return self.inner.decode(form, pages)


def test_no_page_is_encoded_twice():
    """Over forks, reorders, drops, joins, crops and many steps, encode sees tokens as they came, and no sealed page.

    Copies of a sequence share the pages that were sealed before; each seals the tokens of its own tail.
    """
    compressor, numbers = Counting(Int4()), itertools.count()

    def step(cache, start, count):
        q, k, v = tokens(MODEL, cache.sequences or 2, count)
        k[..., 0] = torch.tensor(list(itertools.islice(numbers, k[..., 0].numel()))).view(k[..., 0].shape)
        feed(cache, start, q, k, v)

    def pages():
        return sum(len(part) for part in compressor.encoded)

    cache = pikv.compose(MODEL, compressor=compressor, page_size=16, tail_tokens=16)
    step(cache, 0, 100)
    assert pages() == 2 * 2 * 5  # (100 - 16) // 16 pages of each of 2 sequences and 2 KV heads
    first = torch.cat(compressor.encoded).flatten()

    twin = cache.fork()
    cache.reorder([1, 1, 0])
    cache.drop([0])
    assert pages() == 20
    for position in range(100, 140):
        step(cache, position, 1)
        step(twin, position, 1)
    assert pages() == 20 + 2 * 2 * 2 * 2  # 2 more of each row, in 2 caches

    cache.join(twin)
    cache.crop(100)  # which leaves 4 tokens of each row's seventh page, and an empty tail
    step(cache, 100, 50)
    assert pages() == 36 + 4 * 2 * 2  # (50 - 16) // 16 of each of 4 sequences
    every = torch.cat(compressor.encoded).flatten()
    assert bool(((every == every.round()) & (every < next(numbers))).all())  # a decoded key's number would be off
    assert int(torch.isin(every, first).sum()) == first.numel()
