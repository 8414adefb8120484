"""Key codes: read the pages whose keys, kept in a few bits, get the most attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from pikv.core import attention
from pikv.core.errors import ConfigError
from pikv.core.ports import IndexForm, IndexMeaning, MassSelector, PageIndex
from pikv.policies.settings import at_least

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig

PAGES_AT_ONCE = 256  # decoded at a time
FLOAT16_MAX = torch.finfo(torch.float16).max


@final
@attrs.frozen(kw_only=True)
class KeyCodes(MassSelector):
    """Estimate the attention to a page from codes of its keys: a score for each token, summed up as softmax does.

    Sources: low-bit keys that say how many pages to read, Twilight, arXiv 2502.02770, section 4.2; their layout, a zero
    and a scale for each channel of a page, KIVI, arXiv 2402.02750, section 3. With one bit the two levels are the means
    of what lies above and below the channel's mean, since the least and the greatest key would be far from most.

    bits: 1, 2 or 4, of a code. An index of 2 bits is about an eighth of keys in float16.
    """

    bits: int = 2
    pages: int = attrs.field(default=32, validator=at_least(1))
    mass: float | None = None
    min_pages: int = attrs.field(default=1, validator=at_least(1))
    dense_layers: int = attrs.field(default=0, validator=at_least(0))

    def __attrs_post_init__(self) -> None:
        if self.bits not in (1, 2, 4):
            raise ConfigError(f"bits must be 1, 2 or 4, got {self.bits!r}; for more, read the keys themselves")
        if self.min_pages > self.pages:
            raise ConfigError(f"min_pages must be at most pages, {self.pages}, got {self.min_pages}; raise pages")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ConfigError(f"mass must be a share of attention, above 0 and at most 1, or None, got {self.mass!r}")

    def index_form(self, layer: LayerConfig, page_size: int) -> IndexForm:
        """Scales, zeros and codes: see IndexMeaning.CODES."""
        nbytes = 4 * layer.key_dim + 4 * self._words(layer.key_dim) * page_size
        return IndexForm(torch.uint8, (nbytes,), IndexMeaning.CODES, bits=self.bits)

    def index(self, keys: Tensor, out: Tensor) -> None:
        """See PageSelector.index. Numbers beyond float16 are kept as its greatest."""
        keys, key_dim = keys.float(), keys.shape[-1]
        lowest, highest = self._levels(keys)
        zero = lowest.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
        scale = ((highest - zero.float()) / self._top).clamp(0, FLOAT16_MAX).half()
        steps = (keys - zero.float()) / torch.where(scale == 0, 1, scale.float())
        codes = steps.round_().clamp_(0, self._top).to(torch.uint8).squeeze(1)
        header = torch.cat([scale, zero], dim=1).flatten(1).view(torch.uint8)
        out[:, : 4 * key_dim] = header
        out[:, 4 * key_dim :] = self._pack(codes).flatten(1)

    def log_mass(self, index: PageIndex, query: Tensor) -> Tensor:
        """See MassSelector.log_mass."""
        blocks = index.arrays.split(PAGES_AT_ONCE, dim=2)
        return torch.cat([self._scores(block, query.float(), index.layer.softcap).logsumexp(-1) for block in blocks], 3)

    def _scores(self, arrays: Tensor, query: Tensor, softcap: float | None) -> Tensor:
        """Estimated scores of each token: [sequences, kv_heads, group, pages, page_size]."""
        key_dim = query.shape[-1]
        scale, zero = arrays[..., : 4 * key_dim].contiguous().view(torch.float16).float().split(key_dim, dim=-1)
        keys = self._unpack(arrays[..., 4 * key_dim :], key_dim) * scale[..., None, :] + zero[..., None, :]
        scores: Tensor = attention.score(query, keys.flatten(2, 3), scale=1.0, softcap=softcap).unflatten(
            3, keys.shape[2:4]
        )
        return scores

    @property
    def _top(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1

    def _levels(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What the lowest and the highest code stand for, of keys [n, page_size, key_dim]: [n, 1, key_dim]."""
        if self.bits > 1:
            return keys.amin(1, keepdim=True), keys.amax(1, keepdim=True)
        above = keys > keys.mean(1, keepdim=True)
        sums = [torch.where(side, keys, 0).sum(1, keepdim=True) for side in (~above, above)]
        high = above.sum(1, keepdim=True)
        lowest = sums[0] / (keys.shape[1] - high)
        return lowest, torch.where(high == 0, lowest, sums[1] / high.clamp(min=1))

    def _words(self, key_dim: int) -> int:
        """How many words of 4 bytes hold the codes of a token."""
        return math.ceil(key_dim * self.bits / 32)

    def _pack(self, codes: Tensor) -> Tensor:
        """Codes uint8 [n, page_size, key_dim] in the order that IndexMeaning.CODES describes."""
        words = self._words(codes.shape[-1])
        padded = F.pad(codes, (0, words * 32 // self.bits - codes.shape[-1]))
        parts = padded.unflatten(-1, (words, -1, 4)).movedim(-3, 1).unbind(-2)  # each [n, words, page_size, 4]
        packed: Tensor = parts[0].clone(memory_format=torch.contiguous_format)
        for place in range(1, len(parts)):
            packed |= parts[place] << (place * self.bits)
        return packed

    def _unpack(self, packed: Tensor, key_dim: int) -> Tensor:
        """Undo `_pack`, of bytes [..., n]: uint8 [..., page_size, key_dim]."""
        words = packed.unflatten(-1, (self._words(key_dim), -1, 4)).movedim(-3, -2)  # [..., page_size, words, 4]
        parts = [(words >> shift) & self._top for shift in range(0, 8, self.bits)]
        return torch.stack(parts, dim=-2).flatten(-3)[..., :key_dim]
