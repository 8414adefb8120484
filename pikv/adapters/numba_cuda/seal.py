"""Writing pages: one block takes a page's tokens from the tail and encodes them as the form says."""

from __future__ import annotations

import functools
import math
from typing import final

import attrs
import numpy as np
import torch
from numba import cuda
from torch import Tensor

from pikv.adapters.numba_cuda.launch import launch
from pikv.adapters.numba_cuda.numbers import FLOAT16_MAX, from_half, half_at_least, half_at_most
from pikv.adapters.numba_cuda.pages import READERS, arrays, bits_of, known, reader
from pikv.core.forms import Affine, Dense, Encoding
from pikv.core.ports import FormCompressor, IndexMeaning, NewPages, PageCodec, PageSelector, SealKernel
from pikv.core.tail import Tail
from pikv.core.torch_backend import index_pages

THREADS = 32
NEAREST = 1.5 * 2.0**52  # added to a small float64 and taken away, leaves the nearest whole number, even of two


def seals(codec: PageCodec) -> bool:
    """Whether the form is all that there is to know of these pages, and the kernel knows it."""
    form, dtype = codec.form, codec.dtype
    if not isinstance(codec.compressor, FormCompressor) or dtype not in READERS or codec.layer.values != "stored":
        return False
    return all(side == Dense(dtype) or (isinstance(side, Affine) and known(side)) for side in (form.keys, form.values))


@final
@attrs.frozen
class NumbaCudaSeal(SealKernel):
    """See SealKernel. The kernel writes an index of bounds too; for others the selector is asked."""

    codec: PageCodec
    selector: PageSelector | None

    def __call__(self, tail: Tail, new: NewPages, out: Tensor) -> Tensor | None:
        """See SealKernel."""
        form, layer, selector = self.codec.form, self.codec.layer, self.selector
        kept = None if selector is None else selector.index_form(layer, form.page_size)
        bounds = kept is not None and kept.meaning is IndexMeaning.BOUNDS
        index = torch.empty(len(out) * bounds, 2, layer.key_dim, dtype=torch.float16, device=out.device)
        refused = torch.zeros(len(out), dtype=torch.int32, device=out.device)
        launch(
            seal_kernel(self.codec),
            (len(out),),
            THREADS,
            bits_of(tail.keys),
            bits_of(tail.values),
            tail.positions,
            *(place.to(out.device) for place in (new.sequence, new.head, new.slots)),
            *arrays(form, out, "key"),
            *arrays(form, out, "value"),
            form.view(out, "positions"),
            bits_of(index),
            refused,
        )
        if bool(refused.any()):
            self._refuse(tail, new, out, int(refused.argmax()))
        if selector is None or bounds:
            return index if bounds else None
        return index_pages(self.codec, selector, out)

    def _refuse(self, tail: Tail, new: NewPages, out: Tensor, page: int) -> None:
        """Have the compressor say why it cannot hold a page."""
        place = tuple(each.to(out.device) for each in (new.sequence[page], new.head[page], new.slots[page]))
        keys, values, positions = (states[place][None] for states in (tail.keys, tail.values, tail.positions))
        self.codec.compressor.encode(self.codec.form, keys, values, positions, out[page : page + 1])
        raise AssertionError("the compressor holds what the kernel refused")


@functools.cache
def seal_kernel(codec: PageCodec):
    """The kernel that writes these pages."""
    form, layer = codec.form, codec.layer
    page_size, key_dim, value_dim = form.page_size, layer.key_dim, layer.value_dim
    write_keys = _writer(form.keys, codec.dtype, along_tokens=True)
    write_values = _writer(form.values, codec.dtype, along_tokens=False)
    read_key = reader(form.keys)

    @cuda.jit(device=True)
    def bound(keys, key_scales, key_zeros, page, index):
        """Write the least and the greatest key of each channel, as they decode, rounded outwards."""
        for channel in range(cuda.threadIdx.x, key_dim, THREADS):
            least, greatest = math.inf, -math.inf
            for token in range(page_size):
                key = float(read_key(keys, key_scales, key_zeros, page, channel, token))
                least, greatest = min(least, key), max(greatest, key)
            index[page, 0, channel] = half_at_most(least)
            index[page, 1, channel] = half_at_least(greatest)

    @cuda.jit
    def seal(
        tail_keys,
        tail_values,
        tail_positions,
        sequences,
        heads,
        slots,
        keys,
        key_scales,
        key_zeros,
        values,
        value_scales,
        value_zeros,
        positions,
        index,
        refused,
    ):
        """One block for each page."""
        page = cuda.blockIdx.x
        sequence, head = sequences[page], heads[page]
        for token in range(cuda.threadIdx.x, page_size, THREADS):
            positions[page, token] = tail_positions[sequence, head, slots[page, token]]
        row, chosen = tail_keys[sequence, head], slots[page]
        fine = write_keys(row, chosen, key_dim, page_size, keys, key_scales, key_zeros, page)
        row = tail_values[sequence, head]
        fine &= write_values(row, chosen, page_size, value_dim, values, value_scales, value_zeros, page)
        if not fine:
            refused[page] = 1
        cuda.syncthreads()
        if index.shape[0]:
            bound(keys, key_scales, key_zeros, page, index)

    return seal


def _writer(encoding: Encoding, dtype: torch.dtype, *, along_tokens: bool):
    """The device function that writes one side of a page, by all threads: whether it can hold the numbers.

    It takes states [tokens, channels], the slots of the page, how many runs and entries there are, the arrays of all
    pages, and which one it is.
    """
    number = READERS[dtype]

    @cuda.jit(device=True)
    def at(states, slots, run, entry):
        return states[slots[entry], run] if along_tokens else states[slots[run], entry]

    if isinstance(encoding, Dense):

        @cuda.jit(device=True)
        def copy(states, slots, runs, entries, codes, scales, zeros, page):
            for place in range(cuda.threadIdx.x, runs * entries, THREADS):
                run, entry = place // entries, place % entries
                codes[page, run, entry] = at(states, slots, run, entry)
            return True

        return copy
    group, highest_code, per, bits = encoding.group, encoding.highest_code, encoding.codes_a_byte, encoding.bits
    word, in_words = encoding.codes_a_word, encoding.order == "words"

    @cuda.jit(device=True)
    def limit(states, slots, run, block, scales, zeros, page):
        """Write the scale and the zero of a group; False for what float16 does not reach."""
        least, greatest, fine = math.inf, -math.inf, True
        for entry in range(block * group, (block + 1) * group):
            value = float(number(at(states, slots, run, entry)))
            least, greatest = min(least, value), max(greatest, value)
            fine = fine and abs(value) <= FLOAT16_MAX
        if fine:
            zero = half_at_most(least + 0.0)  # the sum makes 0.0 of -0.0
            zeros[page, block, run] = zero
            scales[page, block, run] = half_at_least((greatest + 0.0 - float(from_half(zero))) / highest_code)
        return fine

    @cuda.jit(device=True)
    def code(states, slots, run, entry, scales, zeros, page):
        scale = float(from_half(scales[page, entry // group, run]))
        if scale == 0.0:
            return 0
        above = float(number(at(states, slots, run, entry))) - float(from_half(zeros[page, entry // group, run]))
        return int((above / scale + NEAREST) - NEAREST)

    @cuda.jit(device=True)
    def encode(states, slots, runs, entries, codes, scales, zeros, page):
        fine = True
        for place in range(cuda.threadIdx.x, runs * (entries // group), THREADS):
            fine &= limit(states, slots, place % runs, place // runs, scales, zeros, page)
        fine = cuda.syncthreads_and(fine) != 0
        if not fine:
            return False
        for place in range(cuda.threadIdx.x, runs * entries // per, THREADS):
            packed = 0
            for part in range(per):
                if in_words:  # a byte holds an entry of `per` runs, four apart
                    run, entry = place // (4 * entries) * word + 4 * part + place % 4, place // 4 % entries
                else:
                    run, entry = place // (entries // per), place % (entries // per) * per + part
                packed |= code(states, slots, run, entry, scales, zeros, page) << (part * bits)
            if in_words:
                codes[page, place // (4 * entries), place // 4 % entries, place % 4] = np.uint8(packed)
            else:
                codes[page, place // (entries // per), place % (entries // per)] = np.uint8(packed)
        return True

    return encode
