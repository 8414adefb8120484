"""What a plan needs to know of a model: its attention as it is cached, and the sizes of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from pikv.core.config import LayerConfig, ModelConfig
from pikv.core.errors import ConfigError

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@attrs.frozen(kw_only=True)
class Weights:
    """Numbers of parameters. always: what every token reads; expert: one expert of one of so many expert_layers."""

    always: int
    expert: int = 0
    expert_layers: int = 0


@attrs.frozen(kw_only=True)
class Shape:
    """A model to plan for.

    model: its attention as PiKV caches it, latents where there are any. expanded: the same with each head's keys and
    values expanded from the latents, as older versions of transformers cache them; None without latents. hidden: the
    channels of a token between layers.
    """

    name: str
    model: ModelConfig
    expanded: ModelConfig | None
    hidden: int
    weights: Weights

    @property
    def parameters(self) -> int:
        """All of the model's."""
        return self._parameters_of(self.model.experts or 0)

    @property
    def active_parameters(self) -> int:
        """What one token goes through."""
        return self._parameters_of(self.model.experts_per_token or 0)

    def read_parameters(self, batch: int) -> float:
        """What a step of so many tokens reads, where each expert is as likely as another."""
        experts, chosen = self.model.experts or 0, self.model.experts_per_token or 0
        return self._parameters_of(experts * (1 - (1 - chosen / experts) ** batch) if experts else 0)

    def _parameters_of(self, experts: float) -> Any:
        return self.weights.always + experts * self.weights.expert * self.weights.expert_layers


def shape_of(name: str, config: Mapping[str, Any], *, dtype: torch.dtype = torch.bfloat16) -> Shape:
    """Read a config of transformers, by its usual names. Raises ConfigError where a number is missing."""
    config = _Fields(name, {**config, **(config.get("text_config") or {})})
    layers, hidden, heads = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    experts = next((config.get(key) for key in _EXPERTS if config.get(key)), None)
    windows = [_window(config, layer_id) for layer_id in range(layers)]
    forms = [_attention(config, heads, hidden, latent=latent) for latent in (True, False)]
    models = [
        ModelConfig.of(
            [LayerConfig(window=window, **form) for window in windows],
            dtype=dtype,
            experts=experts,
            experts_per_token=config["num_experts_per_tok"] if experts else None,
        )
        for form in forms
    ]
    return Shape(
        name=name,
        model=models[0],
        expanded=None if models[1] == models[0] else models[1],
        hidden=hidden,
        weights=_weights(config, layers, hidden, heads, experts),
    )


class _Fields(dict[str, Any]):
    """A config that says what is missing."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self._name = name

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"{self._name}: the model's config must have {key}; it has {', '.join(sorted(self))}")


def _window(config: _Fields, layer_id: int) -> int | None:
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return None
    kinds, pattern = config.get("layer_types"), config.get("sliding_window_pattern")
    slides = kinds[layer_id] == "sliding_attention" if kinds else not pattern or (layer_id + 1) % pattern != 0
    return int(window) if slides else None


def _attention(config: _Fields, heads: int, hidden: int, *, latent: bool) -> dict[str, Any]:
    """Heads and their sizes, as LayerConfig takes them."""
    if (rank := config.get("kv_lora_rank")) is None:
        head_dim = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        return {"query_heads": heads, "kv_heads": kv_heads, "key_dim": head_dim, "value_dim": head_dim}
    rotated = config["qk_rope_head_dim"]
    key_dim = config["qk_nope_head_dim"] + rotated
    if not latent:
        return {"query_heads": heads, "kv_heads": heads, "key_dim": key_dim, "value_dim": config["v_head_dim"]}
    cached = {"kv_heads": 1, "key_dim": rank + rotated, "value_dim": rank, "values": "key_prefix"}
    return {"query_heads": heads, "scale": key_dim**-0.5, **cached}


def _weights(config: _Fields, layers: int, hidden: int, heads: int, experts: int | None) -> Weights:
    """Matrices alone: norms and biases are a thousandth of them."""
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    always = embeddings + layers * _attention_parameters(config, heads, hidden)
    inner = config["intermediate_size"]
    if not experts:
        return Weights(always=always + layers * 3 * hidden * inner)
    dense = min(layers, config.get("first_k_dense_replace") or len(config.get("mlp_only_layers") or []))
    expert = 3 * hidden * (config.get("moe_intermediate_size") or inner)
    shared = (config.get("n_shared_experts") or 0) * expert
    shared += 3 * hidden * (config.get("shared_expert_intermediate_size") or 0)
    routed = layers - dense
    always += dense * 3 * hidden * inner + routed * (shared + hidden * experts)
    return Weights(always=always, expert=expert, expert_layers=routed)


def _attention_parameters(config: _Fields, heads: int, hidden: int) -> int:
    rank = config.get("kv_lora_rank")
    if rank is None:
        form = _attention(config, heads, hidden, latent=False)
        return 2 * int(hidden * form["key_dim"] * (heads + form["kv_heads"]))
    plain, rotated, value_dim = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    through = config.get("q_lora_rank")
    query = heads * (plain + rotated)
    queries = hidden * query if through is None else through * (hidden + query)
    latents = hidden * (rank + rotated) + rank * heads * (plain + value_dim)
    return int(queries + latents + heads * value_dim * hidden)
