"""What a model is; checked when constructed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import attrs
import torch

from pikv.core.errors import ConfigError
from pikv.core.rotary import Rotary
from pikv.core.validators import optional_positive, positive

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _floats(logits: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(logit) for logit in logits)


@attrs.frozen(kw_only=True)
class LayerConfig:
    """One attention layer.

    scale: of the scores; 1 / sqrt(key_dim) by default. window: how many tokens back a query sees, itself included;
    None for all. softcap: scores become softcap * tanh(score / softcap). sinks: one logit a query head that takes
    weight in the softmax and gives no output (gpt-oss). rotary: how keys were rotated, for parts that need to know.
    values: "stored", or "key_prefix" where a token's value is the first value_dim channels of its key, which are then
    stored once: the latents of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    """

    query_heads: int = attrs.field(validator=positive)
    kv_heads: int = attrs.field(validator=positive)
    key_dim: int = attrs.field(validator=positive)
    value_dim: int = attrs.field(validator=positive)
    scale: float = attrs.field()
    window: int | None = attrs.field(default=None, validator=optional_positive)
    softcap: float | None = None
    sinks: tuple[float, ...] | None = attrs.field(default=None, converter=attrs.converters.optional(_floats))
    rotary: Rotary | None = None
    values: Literal["stored", "key_prefix"] = "stored"

    @scale.default
    def _scale(self) -> float:
        positive(self, attrs.fields(LayerConfig).key_dim, self.key_dim)  # validators run after defaults
        return float(self.key_dim**-0.5)

    def __attrs_post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise ConfigError(f"query_heads must be a multiple of kv_heads, got {self.query_heads} and {self.kv_heads}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"scale must be a positive number, got {self.scale!r}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ConfigError(f"softcap must be a positive number or None, got {self.softcap!r}")
        if self.sinks is not None and len(self.sinks) != self.query_heads:
            raise ConfigError(
                f"sinks must have one logit for each of {self.query_heads} query heads, got {len(self.sinks)}"
            )
        if self.values not in ("stored", "key_prefix"):
            raise ConfigError(f"values must be 'stored' or 'key_prefix', got {self.values!r}")
        if self.values == "key_prefix" and self.value_dim > self.key_dim:
            raise ConfigError(
                f"value_dim must be at most key_dim = {self.key_dim} where values are a key_prefix, got "
                f"{self.value_dim}; give the key's channels that are the value first"
            )

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.query_heads // self.kv_heads


@attrs.frozen(init=False)
class ModelConfig:
    """The attention layers of a model, their dtype and device, and its experts.

    `ModelConfig(layers=32, query_heads=32, kv_heads=8, head_dim=128)` for a uniform model; `ModelConfig.of([...])`
    for one whose layers differ.
    """

    layers: tuple[LayerConfig, ...]
    dtype: torch.dtype
    device: torch.device
    experts: int | None
    experts_per_token: int | None

    def __init__(
        self,
        *,
        layers: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        window: int | None = None,
        rotary: Rotary | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        experts: int | None = None,
        experts_per_token: int | None = None,
    ) -> None:
        if not isinstance(layers, int) or layers < 1:
            raise ConfigError(f"layers must be a positive whole number, got {layers!r}; see ModelConfig.of for a list")
        layer = LayerConfig(
            query_heads=query_heads,
            kv_heads=kv_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            window=window,
            rotary=rotary,
        )
        self._set((layer,) * layers, dtype, device, experts, experts_per_token)

    @classmethod
    def of(
        cls,
        layers: Iterable[LayerConfig],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        experts: int | None = None,
        experts_per_token: int | None = None,
    ) -> ModelConfig:
        """A model of the given layers, in their order."""
        model = cls.__new__(cls)
        model._set(tuple(layers), dtype, device, experts, experts_per_token)
        return model

    def _set(
        self,
        layers: Sequence[LayerConfig],
        dtype: torch.dtype,
        device: torch.device | str,
        experts: int | None,
        experts_per_token: int | None,
    ) -> None:
        if not layers:
            raise ConfigError("layers must not be empty")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if (experts is None) != (experts_per_token is None):
            raise ConfigError(f"experts and experts_per_token go together, got {experts} and {experts_per_token}")
        if experts is not None and experts_per_token is not None and not 1 <= experts_per_token <= experts:
            raise ConfigError(f"experts_per_token must be between 1 and experts = {experts}, got {experts_per_token}")
        placed = torch.empty(0, device=device).device  # as tensors say it: "cuda" is cuda:0 there, and "cpu:0" is cpu
        self.__attrs_init__(tuple(layers), dtype, placed, experts, experts_per_token)
