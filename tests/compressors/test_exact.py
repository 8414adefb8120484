from __future__ import annotations

from typing import final

import attrs
import pytest
import torch

from pikv import LayerConfig
from pikv.core.exact import Exact
from pikv.core.forms import Dense, KeyPrefix
from pikv.core.ports import Compressor
from pikv.testing.compressor import CompressorConformance


class TestExact(CompressorConformance):
    def make(self) -> Compressor:
        return Exact()

    def test_entries_are_stored_in_the_models_dtype(self):
        """A page of 64 tokens of float16 at head_dim 128 takes 2 * 64 * 128 * 2 bytes, and 256 for positions."""
        layer = LayerConfig(query_heads=1, kv_heads=1, key_dim=128, value_dim=128)
        form = self.make().form(layer, page_size=64, dtype=torch.float16)
        assert (form.keys, form.values) == (Dense(torch.float16), Dense(torch.float16))
        assert form.stride == 33024

    def test_values_that_keys_hold_take_no_bytes(self):
        """Latents of 512 channels and 64 rotated ones, as DeepSeek has them: 64 tokens of float16 at 576 channels."""
        layer = LayerConfig(query_heads=1, kv_heads=1, key_dim=576, value_dim=512, values="key_prefix")
        form = self.make().form(layer, page_size=64, dtype=torch.float16)
        assert (form.keys, form.values) == (Dense(torch.float16), KeyPrefix(512))
        assert form.stride == 64 * 576 * 2 + 256

    def test_decode_copies_nothing(self):
        """Keys and values are views of the pages."""
        for sample in self.samples(2):
            pages = self.encoded(sample)
            for states in self.make().decode(sample.form, pages):
                assert states.untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()


@final
@attrs.frozen
class Broken(Compressor):
    """Exact with one defect, named by the test of the suite that must find it."""

    defect: str

    def form(self, layer, *, page_size, dtype):
        form = Exact().form(layer, page_size=page_size, dtype=dtype)
        keys, *others = form.fields  # values, where they are stored, then positions
        values, positions = others if len(others) == 2 else (keys, others[0])
        if self.defect == "fields_are_aligned_and_do_not_overlap":
            values = attrs.evolve(values, offset=values.offset - 64)
        if self.defect == "form_has_the_positions_of_its_slots":
            positions = attrs.evolve(positions, dtype=torch.int64)
        return attrs.evolve(form, fields=(keys, *([values] if len(others) == 2 else []), positions))

    def encode(self, form, keys, values, positions, out):
        before = out[:, 0].clone()
        if self.defect == "positions_come_back_exactly":
            positions = positions.float().int()
        if self.defect == "round_trip_is_within_the_bound":
            values = values + values.abs().amax() / 1000
        if self.defect == "no_pages":
            values = values.clamp(max=values.max())
        if self.defect == "the_layout_of_the_inputs_does_not_matter":
            keys = keys.as_strided(keys.shape, torch.empty(keys.shape).stride())
        if self.defect == "a_page_does_not_depend_on_its_batch":
            values = values.flip(0)
        Exact().encode(form, keys, values, positions, out)
        if self.defect == "encode_writes_only_out":
            keys.zero_()
        if self.defect == "encode_into_every_other_row":
            out.as_strided((len(out), form.stride), (form.stride, 1)).copy_(out)
        if self.defect == "encode_is_deterministic":
            out[:, 0] = before

    def decode(self, form, pages):
        keys, values = Exact().decode(form, pages)
        if self.defect == "decode_gives_the_shapes_that_went_in":
            keys = keys.mT
        if self.defect == "decode_changes_nothing":
            pages.zero_()
        if self.defect == "decoding_a_page_does_not_depend_on_its_batch":
            values = values - values.mean(0)
        return keys, values


@pytest.mark.parametrize(
    "defect",
    [
        "a_page_does_not_depend_on_its_batch",
        "decode_changes_nothing",
        "decode_gives_the_shapes_that_went_in",
        "decoding_a_page_does_not_depend_on_its_batch",
        "encode_into_every_other_row",
        "encode_is_deterministic",
        "encode_writes_only_out",
        "fields_are_aligned_and_do_not_overlap",
        "form_has_the_positions_of_its_slots",
        "no_pages",
        "positions_come_back_exactly",
        "round_trip_is_within_the_bound",
        "the_layout_of_the_inputs_does_not_matter",
    ],
)
def test_the_suite_finds_a_defect(defect):
    """Each test of the suite fails for a compressor that breaks the fact it states."""

    class Suite(CompressorConformance):
        def make(self) -> Compressor:
            return Broken(defect)

    with pytest.raises((AssertionError, RuntimeError)):
        getattr(Suite(), f"test_{defect}")()
