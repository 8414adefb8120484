"""The first coordinates of all keys, and all coordinates of the few keys that these do not do justice to."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import torch
from torch import Tensor

from pikv.core.attention import accumulator
from pikv.core.errors import ConfigError
from pikv.core.forms import PageForm, WithOutliers
from pikv.core.ports import Compressor
from pikv.core.validators import positive

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig


@final
@attrs.frozen(kw_only=True)
class Leading(Compressor):
    """Write the first `rank` channels of each key by `inner`, and the `outliers` keys of a page whole beside them.

    For keys that are written along axes, the longest first: the outliers are the tokens with the most in the channels
    that are left out, which without them is what low rank loses. They are stored in the model's dtype. After ShadowKV,
    arXiv 2410.21465, section 4, which keeps the chunks exact whose keys are least like their mean, by their landmarks;
    here it is by what is lost, and every page has as many.
    """

    rank: int = attrs.field(validator=positive)
    outliers: int = attrs.field(validator=positive)
    inner: Compressor

    def form(self, layer: LayerConfig, *, page_size: int, dtype: torch.dtype) -> PageForm:
        """That of `inner` for keys of `rank` channels, followed by outlier_keys [outliers, key_dim], outlier_slots.

        Raises ConfigError for more outliers than tokens.
        """
        if self.outliers > page_size:
            raise ConfigError(f"outliers must be at most page_size = {page_size}, got {self.outliers}; lower them")
        inner = self.inner.form(attrs.evolve(layer, key_dim=self.rank), page_size=page_size, dtype=dtype)
        arrays = {
            "outlier_keys": (dtype, (self.outliers, layer.key_dim)),
            "outlier_slots": (torch.uint8, (self.outliers,)),
        }
        return inner.followed_by(arrays, keys=WithOutliers(inner.keys, self.outliers))

    def encode(self, form: PageForm, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
        """See Compressor.encode."""
        inner = _inner(form)
        self.inner.encode(inner, keys[..., : self.rank], values, positions, out[:, : inner.stride])
        lost = keys[..., self.rank :].to(accumulator(keys.dtype)).square().sum(-1)
        slots = lost.argsort(dim=-1, descending=True, stable=True)[:, : self.outliers].sort(dim=-1).values
        form.view(out, "outlier_slots").copy_(slots)
        form.view(out, "outlier_keys").copy_(keys.gather(1, _for_each_channel(slots, keys.shape[-1])))

    def decode(self, form: PageForm, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys in float32 at least, 0 beyond `rank` but for the outliers, and values as `inner` has them."""
        inner, whole = _inner(form), form.view(pages, "outlier_keys")
        leading, values = self.inner.decode(inner, pages[:, : inner.stride])
        whole = whole.to(accumulator(whole.dtype))
        keys = whole.new_zeros(*leading.shape[:2], whole.shape[-1])
        keys[..., : self.rank] = leading
        slots = _for_each_channel(form.view(pages, "outlier_slots").long(), whole.shape[-1])
        return keys.scatter_(1, slots, whole), values


def _inner(form: PageForm) -> PageForm:
    """The form that `inner` made, whose fields come first."""
    assert isinstance(form.keys, WithOutliers)  # the form is one that Leading made
    return attrs.evolve(form, keys=form.keys.encoding, fields=form.fields[:-2])


def _for_each_channel(slots: Tensor, channels: int) -> Tensor:
    """Slots [n, outliers] as an index of keys [n, page_size, channels]."""
    return slots[..., None].expand(-1, -1, channels)
