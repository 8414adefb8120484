"""Plans of the byte solver for the small model, which benchmarks/front.py puts beside even splits of the same bytes.

What each saving costs is measured on texts that the model was trained on, with 32 hidden pairs each; plans are for
shares of the float16 dense cache's bytes, tail and tables included.

    python benchmarks/solver.py --output docs/tables/solver_plans.json
    python benchmarks/front.py --plans docs/tables/solver_plans.json --only 'keydiff, byte solver' ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from shared import small_model, tables
from transformers import AutoModelForCausalLM, AutoTokenizer

import pikv
from pikv.adapters.compressors import Int2, Int4, Int8, Rotated
from pikv.adapters.transformers.families import model_config
from pikv.compositions import bytes_a_token
from pikv.evaluation.recall import recall, standard_library
from pikv.evaluation.solver import composed_within, measure

FORMATS = {"int2": Int2(), "int2_rotated": Rotated(Int2()), "int4": Int4(), "int8": Int8()}
NAMES: dict[str, Any] = {
    "token_selector": {"name": "keydiff", "recent": 8},
    "page_size": 16,
    "tail_tokens": 16,
}


def main() -> None:
    """Measure once, solve for each share, write names that compose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=small_model.MODEL)
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--length", type=int, default=2048, help="characters of a text")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.05])
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float16).eval()
    tokenizer, shape = AutoTokenizer.from_pretrained(arguments.model), model_config(model)
    text = standard_library(held_out=False)
    task = recall(text, length=arguments.length, pairs=arguments.pairs, samples=arguments.texts, seed=0)
    runtime = pikv.runtime_from({**NAMES, "budget_tokens": 64}, shape)
    compressors = list(FORMATS.values())
    losses = measure(model, tokenizer, task, runtime=runtime, compressors=compressors, batch=arguments.texts)

    whole = sum(layer.kv_heads * bytes_a_token(layer, shape.dtype) for layer in shape.layers) * arguments.length
    plans = {}
    for share in arguments.shares:
        composed, plan = composed_within(int(share * whole), losses, runtime=runtime, compressors=compressors)
        plans[str(share)] = {
            **NAMES,
            "allocator": {"name": "planned", "most": [list(heads) for heads in plan.pages]},
            "compressor": [list(FORMATS)[number] for number in plan.formats],
            "budget_tokens": composed.budget_tokens,
        }
    tables.write(json.dumps({"command": tables.command().strip(), "plans": plans}, indent=1) + "\n", arguments.output)
    for layer_id, layer in enumerate(losses):
        formats = ", ".join(f"{name} {loss:.4f}" for name, loss in zip(FORMATS, layer.formats, strict=True))
        print(f"layer {layer_id}, bits a token lost by format: {formats}")
        for head, lost in enumerate(layer.heads):
            print(f"  head {head}, by pages: {', '.join(f'{count} {loss:.4f}' for count, loss in lost.items())}")
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
