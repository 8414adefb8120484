"""How a transformers model rotates its keys, read off its rotary embedding."""

from __future__ import annotations

from typing import Any

from pikv.adapters.transformers.latent import latent_kv
from pikv.core.rotary import Rotary

_BY_LENGTH = ("dynamic", "longrope")
"""Types of rotary embedding whose frequencies depend on how long the text is."""


def rotary_of(model: Any, layer_id: int) -> Rotary | None:
    """How a layer's keys are rotated as they are cached; None if that depends on the length of the text."""
    embedding, attention = model.base_model.rotary_emb, model.base_model.layers[layer_id].self_attn
    kind, prefix = embedding.rope_type, ""
    if isinstance(kind, dict):  # Gemma 3: sliding and full layers rotate differently
        name = model.config.layer_types[layer_id]
        kind, prefix = kind[name], f"{name}_"
    if kind in _BY_LENGTH:
        return None
    return Rotary(
        frequencies=tuple(getattr(embedding, f"{prefix}inv_freq").tolist()),
        start=_start(attention),
        pairing="neighbours" if model.config.model_type == "deepseek_v2" else "halves",
        scaling=float(getattr(embedding, f"{prefix}attention_scaling")),
    )


def _start(attention: Any) -> int:
    """The first rotated channel of a cached key: DeepSeek's rotated part comes after the other."""
    if (latent := latent_kv(attention)) is not None:
        return latent.rank
    start: int = getattr(attention, "qk_nope_head_dim", 0)
    return start
