"""The facts that every Compressor must hold to, as tests to inherit.

    class TestMine(CompressorConformance):
        def make(self) -> Compressor:
            return Mine()

        def error_bound(self, form, pages, states, decoded, side):
            return 0.01 * states.abs()

Override `layers` too where the format refuses some of its dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import attrs
import torch
from torch import Tensor

from pikv.core.attention import attend
from pikv.core.config import DTYPES, LayerConfig
from pikv.core.forms import ALIGNMENT, PageForm
from pikv.core.ports.compressor import BasisCompressor, Compressor
from pikv.core.runtime import PAGE_SIZES

Side = Literal["keys", "values"]


@attrs.frozen(kw_only=True)
class Sample:
    """Pages of tokens: keys [n, page_size, key_dim], values [n, page_size, value_dim], positions [n, page_size]."""

    form: PageForm
    keys: Tensor
    values: Tensor
    positions: Tensor

    def take(self, index: slice | Tensor) -> Sample:
        """The pages at an index."""
        return attrs.evolve(self, keys=self.keys[index], values=self.values[index], positions=self.positions[index])

    def slab(self, fill: int) -> Tensor:
        """Room for the pages, uint8 [n, stride], full of old bytes."""
        return torch.full((len(self.keys), self.form.stride), fill, dtype=torch.uint8)


class CompressorConformance:
    """Inherit, and say what `make` makes and how far decoded entries may be from what was encoded.

    A BasisCompressor is given coordinates, as a cache does; see BasisConformance for the basis itself.
    """

    def make(self) -> Compressor:
        """Make the compressor to test, with the same settings every time."""
        raise NotImplementedError("make: return the compressor to test")

    def layers(self) -> list[LayerConfig]:
        """The layers to test with; leave out dimensions that the compressor refuses."""
        dims = ((64, 64), (128, 128), (40, 20), (192, 128))
        layers = [LayerConfig(query_heads=2, kv_heads=1, key_dim=key, value_dim=value) for key, value in dims]
        return [*layers, LayerConfig(query_heads=2, kv_heads=1, key_dim=72, value_dim=64, values="key_prefix")]

    def error_bound(self, form: PageForm, pages: Tensor, states: Tensor, decoded: Tensor, side: Side) -> Tensor:
        """The largest allowed |states - decoded|, broadcastable to them: [n, page_size, dim], in float64.

        states: what was encoded. pages: what it became, uint8 [n, stride]. 0 unless overridden: nothing is lost.
        """
        return torch.zeros(())

    # --- what the tests share

    def samples(self, pages: int) -> Iterator[Sample]:
        """Pages of every layer, page size and dtype: normal entries, an outlier channel, constant runs, gaps."""
        generator, compressor = torch.Generator().manual_seed(0), self.make()
        for given in self.layers():
            layer = compressor.stored(given) if isinstance(compressor, BasisCompressor) else given
            for page_size in PAGE_SIZES:
                for dtype in DTYPES:
                    form = compressor.form(given, page_size=page_size, dtype=dtype)
                    keys = torch.randn(pages, page_size, layer.key_dim, generator=generator)
                    values = torch.randn(pages, page_size, layer.value_dim, generator=generator)
                    keys[..., 0] *= 50  # an outlier channel
                    keys[..., -1] = 0.3  # constant along tokens
                    values[:, 0] = -2.0  # constant along channels
                    if layer.values == "key_prefix":
                        values = keys[..., : layer.value_dim]
                    steps = torch.randint(1, 1000, (pages, page_size), generator=generator)
                    positions = steps.cumsum(-1)
                    positions[:, -1] = torch.iinfo(torch.int32).max
                    yield Sample(form=form, keys=keys.to(dtype), values=values.to(dtype), positions=positions.int())

    def encoded(self, sample: Sample, *, fill: int = 0xA5) -> Tensor:
        """The sample's pages, written over old bytes."""
        out = sample.slab(fill)
        self.make().encode(sample.form, sample.keys, sample.values, sample.positions, out)
        return out

    def assert_same_fields(self, form: PageForm, pages: Tensor, others: Tensor, what: str) -> None:
        """Compare all bytes of all fields; what lies between fields is nobody's."""
        for field in form.fields:
            run = slice(field.offset, field.offset + field.nbytes)
            same = torch.equal(pages[:, run], others[:, run])
            assert same, f"field {field.name!r} differs {what}; the form is {form}"

    # --- the form

    def test_equal_settings_are_equal_and_hash_alike(self) -> None:
        """A cache finds kernels and slabs by compressor and form, so both are values: equal when made alike."""
        assert self.make() == self.make(), "make() twice gave unequal compressors; use attrs.frozen"
        assert hash(self.make()) == hash(self.make())
        for layer in self.layers():
            one, other = (self.make().form(layer, page_size=32, dtype=torch.float32) for _ in range(2))
            assert one == other, f"form() twice gave {one} and {other}"
            assert hash(one) == hash(other)

    def test_fields_are_aligned_and_do_not_overlap(self) -> None:
        """Fields start at multiples of 64 bytes, do not overlap, and end within a stride that keeps them aligned."""
        for sample in self.samples(0):
            form, end = sample.form, 0
            for field in sorted(form.fields, key=lambda field: field.offset):
                assert field.offset % ALIGNMENT == 0, f"{field} is not at a multiple of {ALIGNMENT} bytes"
                assert field.offset >= end, f"{field} overlaps the field before it, which ends at {end}"
                end = field.offset + field.nbytes
            assert form.stride >= end > 0, f"stride {form.stride} is shorter than the fields, {end} bytes"
            assert form.stride % ALIGNMENT == 0, f"stride {form.stride} is not a multiple of {ALIGNMENT}"

    def test_form_has_the_positions_of_its_slots(self) -> None:
        """Every form is of the page size asked for, and has the field "positions", int32 [page_size]."""
        for layer in self.layers():
            for page_size in PAGE_SIZES:
                form = self.make().form(layer, page_size=page_size, dtype=torch.float16)
                assert form.page_size == page_size, f"page_size is {form.page_size}, asked for {page_size}"
                found = [(field.dtype, field.shape) for field in form.fields if field.name == "positions"]
                assert found == [(torch.int32, (page_size,))], f'fields called "positions" are {found}'

    # --- encoding

    def test_encode_writes_only_out(self) -> None:
        """The inputs stay as they are, and so do the pages on both sides of those that are written."""
        for sample in self.samples(3):
            before = [states.clone() for states in (sample.keys, sample.values, sample.positions)]
            slab = torch.full((5, sample.form.stride), 0xA5, dtype=torch.uint8)
            self.make().encode(sample.form, sample.keys, sample.values, sample.positions, slab[1:4])
            for old, new in zip(before, (sample.keys, sample.values, sample.positions), strict=True):
                assert torch.equal(old, new), "encode changed what it was given"
            assert bool((slab[[0, 4]] == 0xA5).all()), "encode wrote beside its pages"

    def test_encode_is_deterministic(self) -> None:
        """The same tokens give the same bytes, whatever lay there before."""
        for sample in self.samples(2):
            once, again = self.encoded(sample, fill=0x00), self.encoded(sample, fill=0xFF)
            self.assert_same_fields(sample.form, once, again, "when the same pages are encoded again over other bytes")

    def test_a_page_does_not_depend_on_its_batch(self) -> None:
        """Pages encoded together have the bytes that each has alone, so a page may be shared and compared."""
        for sample in self.samples(5):
            together = self.encoded(sample)
            alone = torch.cat([self.encoded(sample.take(slice(page, page + 1))) for page in range(5)])
            self.assert_same_fields(sample.form, together, alone, "between pages encoded together and one by one")

    def test_the_layout_of_the_inputs_does_not_matter(self) -> None:
        """Strided keys and values give the bytes that contiguous ones give."""
        for sample in self.samples(2):
            strided = attrs.evolve(
                sample,
                keys=sample.keys.mT.contiguous().mT,
                values=sample.values.repeat_interleave(2, dim=1)[:, ::2],
                positions=sample.positions.mT.contiguous().mT,
            )
            pages = self.encoded(sample), self.encoded(strided)
            self.assert_same_fields(sample.form, *pages, "between strided and contiguous inputs")

    def test_encode_into_every_other_row(self) -> None:
        """`out` may be rows that do not follow one another; the rows between stay as they are."""
        for sample in self.samples(3):
            slab = torch.full((6, sample.form.stride), 0xA5, dtype=torch.uint8)
            self.make().encode(sample.form, sample.keys, sample.values, sample.positions, slab[::2])
            self.assert_same_fields(sample.form, slab[::2], self.encoded(sample), "in rows that do not touch")
            assert bool((slab[1::2] == 0xA5).all()), "encode wrote between its pages"

    def test_no_pages(self) -> None:
        """Nothing to encode and nothing to decode are fine."""
        for sample in self.samples(0):
            keys, values = self.make().decode(sample.form, self.encoded(sample))
            assert keys.shape == sample.keys.shape, f"keys are {list(keys.shape)}, not {list(sample.keys.shape)}"
            assert values.shape == sample.values.shape, f"values are {list(values.shape)}"

    # --- decoding

    def test_decode_gives_the_shapes_that_went_in(self) -> None:
        """Keys [n, page_size, key_dim] and values [n, page_size, value_dim], floating point."""
        for sample in self.samples(2):
            keys, values = self.make().decode(sample.form, self.encoded(sample))
            assert keys.shape == sample.keys.shape, f"keys are {list(keys.shape)}, not {list(sample.keys.shape)}"
            assert values.shape == sample.values.shape, f"values are {list(values.shape)}"
            assert keys.is_floating_point(), f"keys are {keys.dtype}"
            assert values.is_floating_point(), f"values are {values.dtype}"

    def test_decode_changes_nothing(self) -> None:
        """Pages are as they were after they have been read."""
        for sample in self.samples(2):
            pages = self.encoded(sample)
            before = pages.clone()
            self.make().decode(sample.form, pages)
            assert torch.equal(pages, before), "decode wrote into the pages"

    def test_decoding_a_page_does_not_depend_on_its_batch(self) -> None:
        """A page decoded alone, or from rows that do not touch, gives the same numbers as among others."""
        for sample in self.samples(4):
            pages = self.encoded(sample)
            everything = self.make().decode(sample.form, pages)
            for part in (slice(1, 2), slice(0, None, 2)):
                for got, expected in zip(self.make().decode(sample.form, pages[part]), everything, strict=True):
                    assert torch.equal(got, expected[part]), f"pages[{part}] decode to other numbers than in the batch"

    def test_round_trip_is_within_the_bound(self) -> None:
        """What comes back differs from what went in by no more than `error_bound`, in every dtype of a model."""
        for sample in self.samples(3):
            pages = self.encoded(sample)
            decoded = self.make().decode(sample.form, pages)
            sides: tuple[Side, Side] = ("keys", "values")
            for side, states, back in zip(sides, (sample.keys, sample.values), decoded, strict=True):
                self.assert_within_bound(sample.form, pages, states, back, side)

    def assert_within_bound(self, form: PageForm, pages: Tensor, states: Tensor, decoded: Tensor, side: Side) -> None:
        """Compare one side in float64."""
        states, decoded = states.double(), decoded.double()
        error, bound = (states - decoded).abs(), self.error_bound(form, pages, states, decoded, side)
        excess = error - bound
        if bool((excess <= 0).all()):  # false for NaN too
            return
        worst = excess.nan_to_num(torch.inf).argmax()
        raise AssertionError(
            f"{side}: {states.flatten()[worst]} came back as {decoded.flatten()[worst]}, allowed is a difference of "
            f"{bound.expand_as(error).flatten()[worst]}; override error_bound if the format loses more"
        )

    def test_positions_come_back_exactly(self) -> None:
        """Positions are not compressed, up to the largest int32."""
        for sample in self.samples(3):
            got = sample.form.view(self.encoded(sample), "positions")
            assert torch.equal(got, sample.positions), f"positions {sample.positions.tolist()} became {got.tolist()}"


class BasisConformance(CompressorConformance):
    """The same, and what the basis of a BasisCompressor must hold to."""

    def make_with_basis(self) -> BasisCompressor:
        """What `make` makes."""
        compressor = self.make()
        assert isinstance(compressor, BasisCompressor), f"{compressor} is no BasisCompressor"
        return compressor

    def tokens(self, layer: LayerConfig, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [3 sequences, 2 kv_heads, count, dim], and which of them are held: none of the last."""
        generator = torch.Generator().manual_seed(1)
        keys = torch.randn(3, 2, count, layer.key_dim, generator=generator)
        values = torch.randn(3, 2, count, layer.value_dim, generator=generator)
        if layer.values == "key_prefix":
            values = keys[..., : layer.value_dim]
        held = torch.arange(count) < torch.tensor([count, count // 2, 0])[:, None]
        return keys, values, held[:, None].expand(-1, 2, -1)

    def test_columns_are_orthonormal(self) -> None:
        """The maps have the dimensions of the layer and of what is stored of it; however many tokens there are."""
        for layer in self.layers():
            stored = self.make_with_basis().stored(layer)
            dims = ((layer.key_dim, stored.key_dim), (layer.value_dim, stored.value_dim))
            for count in (0, 1, 200):
                basis = self.make_with_basis().fit(layer, *self.tokens(layer, count))
                for columns, dim in zip(basis.tensors, dims, strict=False):
                    assert columns.shape[-2:] == dim, f"columns are {list(columns.shape)}, of {dim}"
                    assert columns.shape[:-2] in ((), (2,), (3, 2)), f"columns are {list(columns.shape)}"
                    unit = torch.eye(dim[1]).expand(*columns.shape[:-2], -1, -1)
                    torch.testing.assert_close(columns.mT @ columns, unit, atol=1e-4, rtol=0)

    def test_fit_changes_nothing(self) -> None:
        """Tokens are as before, and give the same basis again."""
        for layer in self.layers():
            given = self.tokens(layer, 100)
            before = [states.clone() for states in given]
            bases = [self.make_with_basis().fit(layer, *given) for _ in range(2)]
            for old, new in zip(before, given, strict=True):
                assert torch.equal(old, new), "fit changed what it was given"
            for one, other in zip(*(basis.tensors for basis in bases), strict=True):
                assert torch.equal(one, other), "fit twice gave different bases"

    def test_a_basis_is_of_its_own_tokens(self) -> None:
        """Neither what other sequences hold nor what lies in empty slots matters."""
        for layer in self.layers():
            keys, values, held = self.tokens(layer, 100)
            alone = self.make_with_basis().fit(layer, keys[1:2, :, :50], values[1:2, :, :50], held[1:2, :, :50])
            full = [states.masked_fill(~held[..., None], 1e4) for states in (keys, values)]
            among = self.make_with_basis().fit(layer, *full, held).select(torch.tensor([1]))
            given = keys[1:2, :, :50], values[1:2, :, :50]
            for one, other in zip(alone.read(*alone.write(*given)), among.read(*among.write(*given)), strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

    def test_attention_is_that_of_what_is_read_back(self) -> None:
        """A query that enters and an output that leaves attend to keys and values as they are read back."""
        for layer in self.layers():
            keys, values, held = self.tokens(layer, 100)
            basis = self.make_with_basis().fit(layer, keys, values, held)
            query = torch.randn(3, 2, 4, layer.key_dim, generator=torch.Generator().manual_seed(2))
            coordinates = basis.write(keys, values)
            wanted = attend(query, *basis.read(*coordinates), scale=layer.scale)
            got = attend(basis.enter(query), *coordinates, scale=layer.scale)
            torch.testing.assert_close(basis.leave(got.output), wanted.output, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(got.log_sum_exp, wanted.log_sum_exp, atol=1e-4, rtol=1e-4)
