"""Low rank: of each key the few coordinates that keys of its sequence, or of a calibration text, differ in."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self, final

import attrs
from torch import Tensor

from pikv.adapters.compressors.axes import Axes, longest_first
from pikv.adapters.compressors.leading import Leading
from pikv.adapters.compressors.rotated import check_plain
from pikv.core.basis import Basis
from pikv.core.errors import ConfigError
from pikv.core.exact import Exact
from pikv.core.ports import BasisCompressor, Compressor, UnrotatedCompressor
from pikv.core.validators import is_a, positive
from pikv.core.views import TokenView

if TYPE_CHECKING:
    from pikv.core.config import LayerConfig


def _not_negative(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if not isinstance(value, int) or value < 0:
        raise ConfigError(f"{attribute.name} must be a whole number of tokens of a page, 0 or more, got {value!r}")


@attrs.frozen(kw_only=True)
class FewAxes(BasisCompressor):
    """What low rank before and after rotary embedding have in common.

    Store `rank` coordinates of each key, which `inner` may round, and values as `inner` stores them. The axes are the
    leading right singular vectors of the keys that a sequence holds when it seals its first page: what later keys have
    beside these is lost. With `axes`, see `calibrated`, they are the same for all sequences, and held once.

    outliers: so many tokens of each page, those that lose the most, keep their keys whole (see Leading), in the model's
    dtype. All axes are held then, not `rank` of them.
    """

    rank: int = attrs.field(validator=positive)
    rounding: Compressor = attrs.field(factory=Exact, validator=check_plain, alias="inner")
    outliers: int = attrs.field(default=0, validator=_not_negative)
    axes: Axes | None = attrs.field(default=None, validator=is_a(Axes))

    @property
    @final
    def inner(self) -> Compressor:
        """Writes the coordinates: `rounding`, with the outliers beside it if there are any."""
        if not self.outliers:
            return self.rounding
        return Leading(rank=self.rank, outliers=self.outliers, inner=self.rounding)

    @staticmethod
    @abc.abstractmethod
    def keys_of(view: TokenView) -> Tensor:
        """The keys that axes are of."""

    @classmethod
    def calibrated(
        cls, views: Iterable[TokenView], *, rank: int, inner: Compressor | None = None, outliers: int = 0
    ) -> tuple[Self, ...]:
        """One for each layer, with the axes of the keys of a calibration text.

        views: of each layer of a cache that has read the text, `PiKVCache.view`, of exact pages.
        """
        rounding = Exact() if inner is None else inner
        made = (Axes.of(cls.keys_of(view), view.positions) for view in views)
        return tuple(cls(rank=rank, inner=rounding, outliers=outliers, axes=axes) for axes in made)

    @final
    def stored(self, layer: LayerConfig) -> LayerConfig:
        """The layer with keys of `rank` channels, or of all where outliers have them.

        Raises ConfigError for fewer, where keys hold the values, and for axes of another layer.
        """
        name = type(self).__name__
        if self.rank > layer.key_dim:
            raise ConfigError(f"rank must be at most key_dim = {layer.key_dim}, got {self.rank}; lower it")
        if layer.values == "key_prefix":
            raise ConfigError(f"{name} needs values that are stored: those of this layer are a prefix of its keys")
        wanted = (layer.kv_heads, layer.key_dim, layer.key_dim)
        if self.axes is not None and self.axes.columns.shape != wanted:
            raise ConfigError(
                f"axes of {name} must be [kv_heads, key_dim, key_dim] = {list(wanted)}, got "
                f"{list(self.axes.columns.shape)}; calibrate it with this model"
            )
        return layer if self.outliers else attrs.evolve(layer, key_dim=self.rank)

    @final
    def fit(self, layer: LayerConfig, keys: Tensor, values: Tensor, held: Tensor) -> Basis:
        """Float32 [sequences, kv_heads, key_dim, rank] of each row, or [kv_heads, key_dim, rank] of the calibration."""
        rank = self.stored(layer).key_dim
        if self.axes is not None:
            return Basis(self.axes.leading(rank, keys.device))
        return Basis(longest_first(keys, held)[..., :rank].contiguous())


@final
@attrs.frozen(kw_only=True)
class LowRank(FewAxes):
    """Low rank of keys as attention has them, after rotary embedding, so that queries enter the basis once.

    Source: keys of a long text are near to low rank (ShadowKV, arXiv 2410.21465, section 3), there of all heads
    together and before rotary embedding, as `UnrotatedLowRank` has it; here of each KV head. See FewAxes.
    """

    @staticmethod
    def keys_of(view: TokenView) -> Tensor:
        """As they are read back."""
        return view.keys


@final
@attrs.frozen(kw_only=True)
class UnrotatedLowRank(FewAxes, UnrotatedCompressor):
    """Low rank of keys before rotary embedding, which are nearer to it. Source: ShadowKV, arXiv 2410.21465, section 3.

    There of all heads together, here of each KV head. Pages hold coordinates of unrotated keys, which are decoded, and
    rotated to their positions, whenever they are attended to; see UnrotatedCompressor and FewAxes. Where a sequence is
    padded on the left its keys keep the rotation by its padding, which axes of a calibration do not know.
    """

    @staticmethod
    def keys_of(view: TokenView) -> Tensor:
        """Before rotary embedding."""
        return view.unrotated_keys
