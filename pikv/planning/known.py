"""Models whose numbers are built in, as their published config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pikv.core.errors import UnknownNameError
from pikv.planning.shapes import Shape, shape_of


def _mixtral(**own: int) -> dict[str, Any]:
    return {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, **own}


def _qwen3(**own: int) -> dict[str, Any]:
    shared = {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
    return {"vocab_size": 151936, **shared, **own}


def _gpt_oss(**own: int) -> dict[str, Any]:
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
    experts = {"hidden_size": 2880, "intermediate_size": 2880, "num_experts_per_tok": 4}
    # Every other layer slides, the first one included.
    return {"vocab_size": 201088, "sliding_window": 128, "sliding_window_pattern": 2, **heads, **experts, **own}


KNOWN: Mapping[str, Mapping[str, Any]] = {
    "mixtral-8x7b": _mixtral(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, vocab_size=32000
    ),
    "mixtral-8x22b": _mixtral(
        num_hidden_layers=56, hidden_size=6144, intermediate_size=16384, num_attention_heads=48, vocab_size=32768
    ),
    "qwen3-30b-a3b": _qwen3(
        num_hidden_layers=48,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_attention_heads=32,
    ),
    "qwen3-235b-a22b": _qwen3(
        num_hidden_layers=94,
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_attention_heads=64,
    ),
    "deepseek-v3": {
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "vocab_size": 129280,
    },
    "gpt-oss-20b": _gpt_oss(num_hidden_layers=24, num_local_experts=32),
    "gpt-oss-120b": _gpt_oss(num_hidden_layers=36, num_local_experts=128),
    "olmoe-1b-7b": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
    },
}


def known(name: str) -> Shape:
    """The shape of a model by its name here. Raises UnknownNameError."""
    if name not in KNOWN:
        raise UnknownNameError(f"{name!r} is not a model whose numbers are built in; those are {', '.join(KNOWN)}")
    return shape_of(name, KNOWN[name])
