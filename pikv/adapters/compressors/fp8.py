"""Pages of 8-bit floating point numbers, scaled to their range."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import torch
from torch import Tensor

from pikv.core.forms import Arrays, Encoding, KeyPrefix, Opaque, PageForm
from pikv.core.ports import Compressor

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig

FP8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa
_LARGEST = torch.finfo(FP8).max
_ENCODING = Opaque("fp8_e4m3")


@final
@attrs.frozen
class Fp8(Compressor):
    """E4M3 numbers of 8 bits; each channel of a page's keys, and each token's value, has a scale in bfloat16.

    Source of the format: FP8 Formats for Deep Learning, arXiv 2209.05433, section 3; of per-channel keys and per-token
    values: KIVI, arXiv 2402.02750, section 3. An entry is `number * scale`, scale the largest magnitude over 448. What
    is decoded differs from what was encoded by at most a 16th of it, or 2**-10 of the scale: small entries beside large
    ones keep their digits, where INT8 rounds all to one step. No range is refused. Torch alone reads these pages.
    """

    def form(self, layer: LayerConfig, *, page_size: int, dtype: torch.dtype) -> PageForm:
        """Keys [key_dim, page_size] and their scales [key_dim], values [page_size, value_dim] and [page_size]."""
        arrays: Arrays = {"keys": (FP8, (layer.key_dim, page_size)), "key_scales": (torch.bfloat16, (layer.key_dim,))}
        values: Encoding = KeyPrefix(layer.value_dim)
        if layer.values == "stored":
            values = _ENCODING
            arrays["values"] = (FP8, (page_size, layer.value_dim))
            arrays["value_scales"] = (torch.bfloat16, (page_size,))
        return PageForm.packed(page_size, _ENCODING, values, arrays | {"positions": (torch.int32, (page_size,))})

    def encode(self, form: PageForm, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
        """See Compressor.encode."""
        sides = {"key": keys.mT} if isinstance(form.values, KeyPrefix) else {"key": keys.mT, "value": values}
        for side, states in sides.items():
            numbers, scales = _scaled(states.float())
            form.view(out, f"{side}s").copy_(numbers)
            form.view(out, f"{side}_scales").copy_(scales)
        form.view(out, "positions").copy_(positions)

    def decode(self, form: PageForm, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in float32."""
        keys = _read(form, pages, "key").mT
        return keys, form.values.of(keys) if isinstance(form.values, KeyPrefix) else _read(form, pages, "value")


def _scaled(states: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of 8 bits, and the scale of each row [..., rows] of states float32 [..., rows, entries]."""
    scales = (states.abs().amax(-1) / _LARGEST).to(torch.bfloat16)
    divisors = scales.float().masked_fill(scales == 0, 1.0)
    # A scale may have been rounded down, and what is beyond the largest number would become NaN.
    return (states / divisors[..., None]).clamp(-_LARGEST, _LARGEST).to(FP8), scales


def _read(form: PageForm, pages: Tensor, side: str) -> Tensor:
    """[n, rows, entries] in float32."""
    return form.view(pages, f"{side}s").float() * form.view(pages, f"{side}_scales").float()[..., None]
