"""How kernels find an entry of a page, for each encoding.

A run is a channel of keys or a token of values, an entry of it a token or a channel. An encoding's arrays are `codes`,
`scales` and `zeros`, the views that `PageForm.view` gives; numbers as they are have codes alone.
"""

from __future__ import annotations

import functools

import torch
from numba import cuda
from torch import Tensor

from pikv.adapters.numba_cuda.numbers import from_bfloat, from_float, from_half
from pikv.core.forms import Affine, Dense, Encoding, PageForm

READERS = {torch.float32: from_float, torch.bfloat16: from_bfloat, torch.float16: from_half}


def bits_of(states: Tensor) -> Tensor:
    """The same memory in a type that numba knows: 16 bits as whole numbers."""
    return states.view(torch.int16) if states.itemsize == 2 else states


def known(encoding: Encoding) -> bool:
    """Whether kernels know how these entries are stored."""
    if isinstance(encoding, Dense):
        return encoding.dtype in READERS
    return isinstance(encoding, Affine) and encoding.order in ("plain", "words")


def arrays(form: PageForm, pages: Tensor, side: str) -> list[Tensor]:
    """Codes, scales and zeros of the "key" or "value" side of pages uint8 [n, stride]."""
    codes = bits_of(form.view(pages, f"{side}s"))
    if isinstance(form.keys if side == "key" else form.values, Dense):
        nothing = torch.empty(0, 0, 0, dtype=torch.int16, device=pages.device)
        return [codes, nothing, nothing]
    return [codes, *(bits_of(form.view(pages, f"{side}_{part}")) for part in ("scales", "zeros"))]


@functools.cache
def reader(encoding: Encoding):
    """The device function read(codes, scales, zeros, page, run, entry) -> float32."""
    if isinstance(encoding, Dense):
        number = READERS[encoding.dtype]

        @cuda.jit(device=True)
        def read_number(codes, scales, zeros, page, run, entry):
            return number(codes[page, run, entry])

        return read_number
    code_of, group = _code_reader(encoding), encoding.group

    @cuda.jit(device=True)
    def read_code(codes, scales, zeros, page, run, entry):
        scale, zero = scales[page, entry // group, run], zeros[page, entry // group, run]
        return code_of(codes, page, run, entry) * from_half(scale) + from_half(zero)

    return read_code


def _code_reader(encoding: Affine):
    bits, per, word, highest = encoding.bits, encoding.codes_a_byte, encoding.codes_a_word, encoding.highest_code

    @cuda.jit(device=True)
    def in_words(codes, page, run, entry):
        return (int(codes[page, run // word, entry, run % 4]) >> (run % word // 4 * bits)) & highest

    @cuda.jit(device=True)
    def plain(codes, page, run, entry):
        return (int(codes[page, run, entry // per]) >> (entry % per * bits)) & highest

    return in_words if encoding.order == "words" else plain
