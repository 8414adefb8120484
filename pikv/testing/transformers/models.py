"""Two small random models, and what differs between versions of transformers."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

VOCABULARY = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,  # nothing stops early
    # Ten times the usual: with 0.02 all tokens get nearly the same attention, and a lost one would hardly be noticed.
    "initializer_range": 0.2,
}


@functools.cache
def llama() -> PreTrainedModel:
    """A dense model in float32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SHAPE)).eval()


@functools.cache
def mixtral() -> PreTrainedModel:
    """A model of experts in float32. Each token gets all of them: of two that nearly tie, rounding would choose one."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=4)).eval()


@functools.cache
def half_llama() -> PreTrainedModel:
    """The dense model in bfloat16."""
    return copy.deepcopy(llama()).to(torch.bfloat16)


def cache_argument(model: PreTrainedModel) -> str:
    """What the model and its `generate` call the cache: `past_key_values`, in newer versions `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
