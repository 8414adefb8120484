"""How much memory a transformers model's prompt takes: DynamicCache, and PiKV with and without a budget.

The model is Mixtral-shaped and its weights are random; the prompt comes in chunks. Each case runs in a process of its
own, so that one does not find the memory of another.

    python benchmarks/host_memory.py --output docs/tables/host_memory.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from shared import processes, tables
from transformers import Cache, DynamicCache, MixtralConfig, MixtralForCausalLM

from pikv.adapters.transformers import attach

BUDGET_TOKENS = 2048
DYNAMIC = "DynamicCache"
CASES: dict[str, dict[str, Any] | None] = {
    DYNAMIC: None,
    "PiKV, everything kept": {},
    "PiKV, recent": {"token_selector": "recent", "budget_tokens": BUDGET_TOKENS},
    "PiKV, importance": {"token_selector": "importance", "budget_tokens": BUDGET_TOKENS},
    "PiKV, importance, pyramid": {
        "token_selector": "importance",
        "budget_tokens": BUDGET_TOKENS,
        "allocator": "pyramid",
    },
    "PiKV, importance, INT4": {
        "token_selector": "importance",
        "budget_tokens": BUDGET_TOKENS,
        "compressor": "int4",
    },
}


def build() -> MixtralForCausalLM:
    """The model: 8 layers, 8 query and 4 KV heads of 128, so that keys and values weigh more than all else."""
    config = MixtralConfig(
        num_hidden_layers=8,
        hidden_size=512,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=1024,
        sliding_window=None,
    )
    return MixtralForCausalLM(config).eval()


def read(model: MixtralForCausalLM, cache: Cache, tokens: int, chunk: int) -> None:
    """A prompt of random tokens, chunk by chunk; only the last token's logits are asked for."""
    for ids in torch.randint(1, 1024, (1, tokens)).split(chunk, dim=1):
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)


@torch.no_grad()
def run_case(name: str, tokens: int, chunk: int) -> dict[str, int]:
    """Read a prompt; what the cache holds in the end, and what the process held at most."""
    torch.manual_seed(0)
    model, names = build(), CASES[name]
    make: Callable[[], Any] = attach(model, names).new_cache if names is not None else DynamicCache
    read(model, make(), 2 * chunk, chunk)  # what torch takes for itself at first is not the cache's
    cache = make()
    before = processes.resident_bytes("VmRSS")
    read(model, cache, tokens, chunk)
    if names is None:
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    else:
        cache.pikv.finish_prefill()
        stored = cache.pikv.stored_bytes().total
    return {"stored": stored, "peak": processes.resident_bytes("VmHWM") - before}


def table(results: dict[str, dict[str, int]], arguments: argparse.Namespace) -> str:
    """A Markdown table in MiB."""
    config = build().config
    token_bytes = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4
    allowed = (BUDGET_TOKENS + arguments.chunk) * token_bytes
    lines = [
        f"A Mixtral-shaped model of 8 layers, 8 query and 4 KV heads, head_dim 128, float32; a prompt of "
        f"{arguments.tokens} tokens in chunks of {arguments.chunk}, budget {BUDGET_TOKENS}, page_size 64, tail_tokens "
        f"128. Budget and one chunk in the model's dtype are {allowed / 2**20:.0f} MiB. Peak: the most that the "
        "process held, less what it held before; activations are in it.",
        "",
        tables.command(),
        "",
        "| cache | stored, MiB | peak, MiB | peak over budget + chunk, MiB |",
        "| --- | --- | --- | --- |",
    ]
    for name, case in results.items():
        over = f"{(case['peak'] - allowed) / 2**20:+.0f}" if "budget_tokens" in (CASES[name] or {}) else ""
        lines.append(f"| {name} | {case['stored'] / 2**20:.0f} | {case['peak'] / 2**20:.0f} | {over} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    processes.main(__doc__, CASES, run_case, table, tokens=16_384)
