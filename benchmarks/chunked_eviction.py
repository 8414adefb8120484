"""What evicting chunk by chunk loses against evicting a whole prompt at once, for each policy.

With chunks, a chunk attends to what was kept of the chunks before, so that memory stays at the budget and one chunk; a
policy decides without having seen what comes after. The shipped model reads held-out text through transformers. Two
measures: bits a character of the text that follows the prompt, and the share of hidden pairs that it still recalls,
asked when the cache has been cut.

    python benchmarks/chunked_eviction.py --output docs/tables/chunked_eviction.md
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import tables
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "downstream_tasks" / "llm" / "next_tok_pred"))  # a folder of scripts

import generate_data  # noqa: E402  # found through the line above

from pikv.adapters.transformers import Host, HostCache, attach  # noqa: E402  # kept with the others

SEED = 78
CUT = {"page_size": 16, "tail_tokens": 32}
POLICIES: dict[str, dict[str, Any]] = {
    "everything kept": {},
    "recent": {"token_selector": {"name": "recent", "sinks": 4, "recent": 32}},
    "importance": {"token_selector": {"name": "importance", "recent": 32}},
    "importance, pyramid": {"token_selector": {"name": "importance", "recent": 32}, "allocator": "pyramid"},
}


def prefill(model: Any, host: Host, ids: Tensor, chunk: int) -> HostCache:
    """A cache that has read ids [batch, tokens], chunk by chunk, and was cut to its budget."""
    cache = host.new_cache()
    for part in ids.split(chunk, dim=1):
        model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    cache.pikv.finish_prefill()
    return cache


def decode(model: Any, cache: HostCache, ids: Tensor) -> Tensor:
    """Log probabilities [batch, tokens - 1, characters] of what follows each token, given one by one."""
    steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1] - 1)]
    return torch.cat(steps, dim=1).log_softmax(-1)


def bits_a_character(model: Any, host: Host, ids: Tensor, prompt: int, chunk: int) -> float:
    """Of what follows a prompt in texts ids [batch, tokens]."""
    cache = prefill(model, host, ids[:, : prompt - 1], chunk)
    said = decode(model, cache, ids[:, prompt - 1 :]).gather(-1, ids[:, prompt:, None])
    return float(-said.mean()) / math.log(2)


def recalled(model: Any, host: Host, samples: list[generate_data.Sample], chunk: int) -> float:
    """The share of values whose every character is the most likely one."""
    ids = torch.from_numpy(np.stack([generate_data.token_ids(sample.text) for sample in samples])).long()
    start = samples[0].question_start
    best = decode(model, prefill(model, host, ids[:, :start], chunk), ids[:, start:]).argmax(-1)
    right = ids[:, start + 1 :] == best
    spans = [slice(span.start - start - 1, span.stop - start - 1) for span in samples[0].answers]
    return float(torch.stack([right[:, span].all(1) for span in spans]).double().mean())


@torch.no_grad()
def measure(model: Any, names: dict[str, Any], chunk: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """Bits a character and share recalled of one policy and size of chunk; the same texts for all."""
    text, rng = generate_data.standard_library(held_out=True), np.random.default_rng(SEED)
    length = arguments.length + arguments.follow
    rows = generate_data.text_rows(text, rng, length=length, samples=arguments.samples)
    samples = [
        generate_data.recall_sample(text, rng, length=arguments.length, pairs=8) for _ in range(arguments.samples)
    ]
    with attach(model, {**CUT, **names}) as host:
        batches = range(0, arguments.samples, arguments.batch)
        bits = [
            bits_a_character(
                model, host, torch.from_numpy(rows[i : i + arguments.batch]).long(), arguments.length, chunk
            )
            for i in batches
        ]
        shares = [recalled(model, host, samples[i : i + arguments.batch], chunk) for i in batches]
    return float(np.mean(bits)), float(np.mean(shares))


def table(results: dict[str, dict[int, tuple[float, float]]], arguments: argparse.Namespace) -> str:
    """Two Markdown tables: rows are policies, columns are sizes of chunk."""
    sizes = sorted(next(iter(results.values())), reverse=True)
    columns = ["policy", "whole prompt", *map(str, sizes[1:])]
    bits = [[name, *(f"{row[size][0]:.3f}" for size in sizes)] for name, row in results.items()]
    shares = [[name, *(f"{100 * row[size][1]:.1f}" for size in sizes)] for name, row in results.items()]
    lines = [
        f"Prompts of {arguments.length} characters, budget {arguments.budget} of them, page_size 16, tail_tokens 32; "
        f"{arguments.samples} texts (seed {SEED}), the {arguments.follow} characters that follow; 8 hidden pairs. "
        "Columns: the size of the chunks that the prompt came in.",
        "",
        tables.command(),
        "",
        "Bits a character of what follows:",
        "",
        tables.markdown(columns, bits),
        "Recalled, %:",
        "",
        tables.markdown(columns, shares),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure every policy with every size of chunk and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "downstream_tasks" / "models" / "tiny_moe")
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    parser.add_argument("--length", type=int, default=2048, help="characters of the prompt")
    parser.add_argument("--follow", type=int, default=64, help="characters after it")
    parser.add_argument("--budget", type=int, default=1024, help="tokens that a layer and head may keep")
    parser.add_argument(
        "--chunks", type=int, nargs="*", default=[1024, 512, 256], help="sizes, beside the whole prompt"
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    results: dict[str, dict[int, tuple[float, float]]] = {}
    sizes = [arguments.length, *arguments.chunks]
    for name, size in tqdm([(name, size) for name in POLICIES for size in sizes]):
        names = POLICIES[name] and {**POLICIES[name], "budget_tokens": arguments.budget}
        results.setdefault(name, {})[size] = measure(model, names, size, arguments)
    tables.save(table(results, arguments), arguments.output)


if __name__ == "__main__":
    main()
