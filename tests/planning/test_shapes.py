"""What is read off a config: the attention as it is cached, and the sizes of the weights."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen2MoeConfig

import pikv
from pikv.adapters.transformers import attach
from pikv.planning.known import KNOWN, known
from pikv.planning.shapes import shape_of

PUBLISHED = {  # billions of parameters, as the models' cards have them
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "deepseek-v3": 671.0,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "olmoe-1b-7b": 6.92,
}

SMALL = {"num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 96, "num_attention_heads": 4}
CONFIGS = [
    MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, sliding_window=8),
    GptOssConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=16, num_local_experts=4, sliding_window=8
    ),
    Qwen2MoeConfig(
        **SMALL,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    DeepseekV3Config(
        **SMALL,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    ),
]


@pytest.mark.parametrize("name", KNOWN)
def test_the_numbers_built_in_add_up_to_what_is_published(name: str) -> None:
    """To a hundredth: a wrong number would show."""
    assert known(name).parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_a_config_gives_what_the_model_has(config: object) -> None:
    """Its parameters, norms and biases aside, and the layers that the adapter finds in the model itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).eval()
    shape = shape_of("model", config.to_dict(), dtype=torch.float32)
    matrices = sum(
        weight.numel() for name, weight in model.named_parameters() if "norm" not in name and "bias" not in name
    )
    assert shape.parameters == pytest.approx(matrices, rel=0.01)
    host = attach(model, pikv.RuntimeConfig())
    found = [(layer.kv_heads, layer.key_dim, layer.value_dim, layer.window) for layer in host.model.layers]
    ways = [shape.model] if shape.expanded is None else [shape.model, shape.expanded]
    assert found in [[(one.kv_heads, one.key_dim, one.value_dim, one.window) for one in way.layers] for way in ways]
    assert (host.model.experts, host.model.experts_per_token) == (
        shape.model.experts,
        shape.model.experts_per_token,
    )


def test_more_tokens_read_more_experts() -> None:
    """One token reads those it goes to, many read all of them."""
    shape = known("mixtral-8x7b")
    assert shape.read_parameters(1) == pytest.approx(shape.active_parameters)
    assert shape.active_parameters < shape.read_parameters(4) < shape.read_parameters(64) <= shape.parameters


def test_a_dense_model_has_no_experts() -> None:
    """And reads all that it has."""
    shape = shape_of("dense", {**SMALL, "intermediate_size": 128})
    assert shape.model.experts is None
    assert shape.parameters == shape.read_parameters(3)


def test_what_is_missing_is_named() -> None:
    """With what there is."""
    with pytest.raises(pikv.ConfigError, match=r"must have vocab_size; it has .*hidden_size"):
        shape_of("odd", {name: number for name, number in SMALL.items() if name != "vocab_size"})
    with pytest.raises(pikv.UnknownNameError, match="deepseek-v3"):
        known("deepseek")
