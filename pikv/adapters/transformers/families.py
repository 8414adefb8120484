"""The model families that PiKV can serve, and how each one attends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pikv.adapters.transformers.latent import latent_kv
from pikv.adapters.transformers.rotary import rotary_of
from pikv.core.config import LayerConfig, ModelConfig
from pikv.core.errors import ConfigError

Windows = Callable[[Any, int], int | None]


def _no_window(config: Any, layer_id: int) -> None:
    """Every layer sees everything."""


def _same_window(config: Any, layer_id: int) -> int | None:
    """All layers slide, or none."""
    window: int | None = config.sliding_window
    return window


def _window_by_layer(config: Any, layer_id: int) -> int | None:
    """Sliding and full layers are mixed."""
    return config.sliding_window if config.layer_types[layer_id] == "sliding_attention" else None


_FAMILIES: dict[str, Windows] = {
    "deepseek_v2": _no_window,
    "deepseek_v3": _no_window,
    "gemma3_text": _window_by_layer,
    "glm4_moe": _no_window,
    "gpt_oss": _window_by_layer,
    "granitemoe": _no_window,
    "llama": _no_window,
    "mixtral": _same_window,
    "olmoe": _no_window,
    "phimoe": _same_window,
    "qwen2_moe": _window_by_layer,
    "qwen3_moe": _same_window,
}
"""What cannot be read off a family's modules: how far back a layer sees, by config and layer."""


def supported_families() -> tuple[str, ...]:
    """The `model_type`s of the transformers configs that can be attached to."""
    return tuple(sorted(_FAMILIES))


def model_config(model: nn.Module) -> ModelConfig:
    """The attention of a transformers model as PiKV sees it. Raises ConfigError for a family that is not supported."""
    config, windows = model.config, _windows(model)
    layers = []
    for layer_id, attention in enumerate(layer.self_attn for layer in model.base_model.layers):
        if not getattr(attention, "is_causal", True):
            raise ConfigError(f"layer {layer_id} attends in both directions; a cache serves causal attention only")
        sinks = getattr(attention, "sinks", None)
        layers.append(
            LayerConfig(
                **_heads(config, attention),
                scale=attention.scaling,
                window=windows(config, layer_id),
                rotary=rotary_of(model, layer_id),
                sinks=None if sinks is None else sinks.detach().float().tolist(),
            )
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ConfigError(
            f"the model must be on one device, got {sorted(map(str, devices))}; load it without device_map"
        )
    return ModelConfig.of(layers, dtype=model.dtype, device=devices.pop(), **_expert_counts(config))


def _windows(model: nn.Module) -> Windows:
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if name not in _FAMILIES:
        raise ConfigError(
            f"models of type {name!r} are not supported; PiKV attaches to {', '.join(supported_families())}. For "
            "another family use PiKVCache itself, with update and attend"
        )
    return _FAMILIES[name]


def _heads(config: Any, attention: Any) -> dict[str, Any]:
    """Heads as transformers caches them: latents, expanded heads (DeepSeek in older versions), or KV heads."""
    heads: int = config.num_attention_heads
    dims: dict[str, Any]
    if (latent := latent_kv(attention)) is not None:
        key_dim = latent.rank + latent.rotated_part
        dims = {"kv_heads": 1, "key_dim": key_dim, "value_dim": latent.rank, "values": "key_prefix"}
    elif hasattr(attention, "qk_head_dim"):
        dims = {"kv_heads": heads, "key_dim": attention.qk_head_dim, "value_dim": attention.v_head_dim}
    else:
        dims = {
            "kv_heads": config.num_key_value_heads,
            "key_dim": attention.head_dim,
            "value_dim": attention.head_dim,
        }
    return {"query_heads": heads, **dims}


def _expert_counts(config: Any) -> dict[str, int | None]:
    """How many experts there are, and how many a token goes to, as ModelConfig takes them; None for a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    return {"experts": experts, "experts_per_token": config.num_experts_per_tok if experts else None}
