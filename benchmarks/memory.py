"""What a budget does to memory: stored bytes, resident memory, and the peak while a long prompt comes in.

Each case runs in a process of its own, so that one does not find the memory of another.

    python benchmarks/memory.py --output docs/tables/memory.md
"""

from __future__ import annotations

import argparse

import torch
from shared import processes, tables

import pikv
from pikv.policies import Importance, Pyramid, Recent, Uniform

MODEL = pikv.ModelConfig(layers=8, query_heads=8, kv_heads=4, head_dim=128)
BUDGET_TOKENS = 4096
CASES = {
    "everything kept": None,
    "recent, uniform": (Recent(), Uniform()),
    "importance, uniform": (Importance(), Uniform()),
    "importance, pyramid": (Importance(), Pyramid()),
}


def fill(cache: pikv.PiKVCache, tokens: int, chunk: int, *, attends: bool) -> None:
    """A prompt of random keys, values and queries, chunk by chunk, layer by layer."""
    for start in range(0, tokens, chunk):
        for layer_id in range(len(MODEL.layers)):
            k, v = torch.randn(2, 1, 4, chunk, 128)
            cache.update(layer_id, start, k, v)
            if attends:
                cache.attend(layer_id, torch.randn(1, 8, chunk, 128))
    cache.finish_prefill()


def run_case(name: str, tokens: int, chunk: int) -> dict[str, int]:
    """Fill a cache and read what it holds and what the process holds."""
    torch.manual_seed(0)
    parts = CASES[name]
    if parts is None:
        cache = pikv.compose(MODEL)
    else:
        cache = pikv.compose(MODEL, token_selector=parts[0], allocator=parts[1], budget_tokens=BUDGET_TOKENS)
    warm = pikv.compose(MODEL)
    fill(warm, chunk, chunk, attends=True)
    warm.reset()
    before = processes.resident_bytes("VmRSS")
    fill(cache, tokens, chunk, attends=parts is not None)  # without a budget attention changes nothing, and is long
    return {
        "stored": cache.stored_bytes().total,
        "resident": processes.resident_bytes("VmRSS") - before,
        "peak": processes.resident_bytes("VmHWM") - before,
    }


def table(results: dict[str, dict[str, int]], arguments: argparse.Namespace) -> str:
    """A Markdown table in MiB, and how much of the fall in stored bytes the process gave back."""
    token_bytes = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) * 4 for layer in MODEL.layers)
    allowed = (BUDGET_TOKENS + arguments.chunk) * token_bytes
    full = results["everything kept"]
    lines = [
        f"{len(MODEL.layers)} layers, 4 KV heads, head_dim 128, float32, page_size 64, tail_tokens 128; a prompt of "
        f"{arguments.tokens} tokens in chunks of {arguments.chunk}, budget {BUDGET_TOKENS}. Budget and one chunk in "
        f"the model's dtype are {allowed / 2**20:.0f} MiB. Resident memory is the process's, less what it held before.",
        "",
        tables.command(),
        "",
        "| composition | stored, MiB | resident, MiB | peak, MiB | peak over budget + chunk | fall given back |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in results.items():
        mib = [case[key] / 2**20 for key in ("stored", "resident", "peak")]
        over = back = ""
        if CASES[name] is not None:
            over = f"{(case['peak'] - allowed) / 2**20:+.0f}"
            back = f"{(full['resident'] - case['resident']) / (full['stored'] - case['stored']):.1%}"
        lines.append(f"| {name} | {mib[0]:.0f} | {mib[1]:.0f} | {mib[2]:.0f} | {over} | {back} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    processes.main(__doc__, CASES, run_case, table, tokens=32_768)
