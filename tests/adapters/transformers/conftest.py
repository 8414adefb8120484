"""Small random models of every family, and what one says with a PiKV cache beside what it says with a DynamicCache."""

from __future__ import annotations

import contextlib

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install pikv[transformers]")
from pikv.adapters.transformers import attach  # noqa: E402  # needs transformers
from pikv.testing.transformers.models import cache_argument  # noqa: E402  # likewise

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # logits of a size that tells right from wrong
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts_per_tok": 2}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
FAMILIES = {
    "mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 4, "sliding_window": None}),
    "mixtral, sliding": ("mixtral", {**EXPERTS, "num_local_experts": 4, "sliding_window": 9}),
    "qwen2_moe, some sliding": (
        "qwen2_moe",
        {
            **EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}),
    "olmoe": ("olmoe", {**EXPERTS, "num_experts": 4}),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "n_group": 1, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 2}),
    "gpt_oss": (
        "gpt_oss",
        {
            **EXPERTS,
            "num_local_experts": 4,
            "head_dim": 16,
            "sliding_window": 9,
            "layer_types": MIXED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "granitemoe": ("granitemoe", {**EXPERTS, "num_local_experts": 4, "attention_multiplier": 0.2}),
    "phimoe, sliding": ("phimoe", {**EXPERTS, "num_local_experts": 4, "sliding_window": 9}),
    "glm4_moe": (
        "glm4_moe",
        {
            **EXPERTS,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 16,
        },
    ),
    "llama": ("llama", {}),
    "gemma3, mixed": (
        "gemma3_text",
        {"head_dim": 32, "sliding_window": 9, "query_pre_attn_scalar": 20, "layer_types": MIXED},
    ),
}


def build(family, **settings):
    """A random model of a family, the same each time."""
    model_type, own = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **own, **settings})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def models():
    """Builds models by family, once each."""
    built = {}

    def get(family):
        if family not in built:
            built[family] = build(family)
        return built[family]

    return get


@pytest.fixture
def random_model():
    """Builds a model of a family, with settings of its own."""
    return build


@pytest.fixture
def family_types():
    """The model types that the tests here run."""
    return {model_type for model_type, _ in FAMILIES.values()}


@pytest.fixture(params=FAMILIES)
def family_model(request, models):
    """A model of each family in turn."""
    return models(request.param)


@pytest.fixture
def mixtral(models):
    """The model for what does not depend on the family."""
    return models("mixtral")


@pytest.fixture
def prompt():
    """Token ids [3, 40] and their mask, padded on the left by 0, 7 and 20."""
    return padded(40, [0, 7, 20])


def padded(tokens, padding, *, left=True, seed=0):
    """Token ids [len(padding), tokens] and their mask."""
    ids = torch.randint(1, SIZES["vocab_size"], (len(padding), tokens), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(tokens)
    mask = torch.stack([places >= n if left else places < tokens - n for n in padding]).long()
    return ids * mask, mask


@pytest.fixture
def pad():
    """Makes other prompts."""
    return padded


class Talk:
    """A model and a cache, asked turn by turn. attached: a context around each question; the model is free between."""

    def __init__(self, model, cache, attached=contextlib.nullcontext):
        self.model, self.cache, self.attached = model, cache, attached
        self.keyword = cache_argument(model)

    def says(self, ids, mask, **settings):
        """The output of generate: sequences, logits."""
        settings = {"do_sample": False, "max_new_tokens": 16, **settings}
        with self.attached():
            return self.model.generate(
                ids,
                attention_mask=mask,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
                **{self.keyword: self.cache},
                **settings,
            )

    def logits(self, **inputs):
        """The logits of one forward call."""
        with self.attached(), torch.no_grad():
            return self.model(**inputs, **{self.keyword: self.cache}).logits


@pytest.fixture
def plain():
    """Talks with transformers' own cache."""
    return lambda model: Talk(model, transformers.DynamicCache(config=model.config))


@pytest.fixture
def pikv_talk():
    """Talks with a PiKV cache, on small pages."""

    def talk(model, **names):
        names = {"page_size": 16, "tail_tokens": 16, **names}
        with attach(model, names) as host:
            return Talk(model, host.new_cache(), lambda: attach(model, names))

    return talk


@pytest.fixture
def alike():
    """Checks that two outputs of generate are the same up to rounding."""

    def check(said, expected, tolerance=1e-4):
        """Logits, and tokens up to the first place where the best two logits of a sequence are nearer than that."""
        open_rows = torch.ones(len(expected.sequences), dtype=torch.bool)
        new = expected.sequences.shape[1] - len(expected.logits)
        for step, (got, wanted) in enumerate(zip(said.logits, expected.logits, strict=True)):
            torch.testing.assert_close(got[open_rows], wanted[open_rows], atol=tolerance, rtol=tolerance)
            best = wanted.topk(2, dim=-1).values
            same = said.sequences[:, new + step] == expected.sequences[:, new + step]
            assert bool((same | ~open_rows | (best[:, 0] - best[:, 1] < tolerance)).all())
            open_rows &= same
        assert open_rows.any()

    return check
