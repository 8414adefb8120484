"""A cache twice as large as the memory for its pages: half of them lie in files, and come back as they are read.

    python examples/larger_than_memory.py

A small model reads Python sources and goes on with them. Quest chooses a few pages for each token; those that a layer
has chosen are fetched ahead for the next. The tokens are compared with those of a cache whose pages are all near; the
exit code is 1 if they differ. It needs pikv[transformers].
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor

import pikv
from pikv.adapters.file_store import FileTier
from pikv.adapters.transformers import HostCache, attach
from pikv.policies import AsThisLayer, FurthestLayer, Quest

MODEL = Path(__file__).parents[1] / "downstream_tasks" / "models" / "tiny_moe"
PAGE_SIZE, CHUNK = 16, 256


def prompt(tokens: int) -> Tensor:
    """Token ids [1, tokens] of the sources of this interpreter's argparse."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = Path(argparse.__file__).read_text("utf-8")
    return tokenizer(text, return_tensors="pt").input_ids[:, :tokens]


def decode(model: transformers.PreTrainedModel, cache: HostCache, ids: Tensor, tokens: int) -> tuple[list[int], float]:
    """Read a prompt in chunks and decode so many tokens: the tokens, and the seconds that each took."""
    keywords = {"past_key_values": cache, "logits_to_keep": 1}
    with torch.inference_mode():
        for chunk in ids.split(CHUNK, dim=1):
            logits = model(input_ids=chunk, **keywords).logits
        said, started = [int(logits[0, -1].argmax())], time.perf_counter()
        while len(said) < tokens:
            said.append(int(model(input_ids=torch.tensor([said[-1:]]), **keywords).logits[0, -1].argmax()))
    return said, (time.perf_counter() - started) / max(1, tokens - 1)


def page_bytes(model: pikv.ModelConfig, runtime: pikv.RuntimeConfig, tokens: int) -> int:
    """What the pages of so many tokens take in all layers."""
    forms = zip(model.layers, runtime.forms(model), strict=True)
    return sum(form.stride * layer.kv_heads * (tokens // PAGE_SIZE) for layer, form in forms)


def main() -> None:
    """Decode with all pages near and with half of them far, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--tokens", type=int, default=150, help="to decode")
    parser.add_argument("--pages", type=int, default=16, help="that Quest reads for each token, layer and KV head")
    arguments = parser.parse_args()
    if not 1000 <= arguments.prompt_tokens <= 8000 or not 2 <= arguments.tokens <= 192:
        parser.error("--prompt-tokens must be 1000 to 8000, --tokens 2 to 192: the model was made for 8192 together")
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = prompt(arguments.prompt_tokens)
    parts = {"page_size": PAGE_SIZE, "tail_tokens": 64}
    parts["page_selector"] = Quest(pages=arguments.pages, dense_layers=0)
    with attach(model, pikv.RuntimeConfig(**parts)) as host:
        decode(model, host.new_cache(), ids[:, :CHUNK], 2)  # kernels are compiled when they first run
        expected, near_s = decode(model, host.new_cache(), ids, arguments.tokens)
        needed = page_bytes(host.model, host.runtime, arguments.prompt_tokens + arguments.tokens)
    with tempfile.TemporaryDirectory() as folder, FileTier(folder, capacity_bytes=2 * needed) as tier:
        far = {"tiers": [tier], "demotion": FurthestLayer(), "predictor": AsThisLayer()}
        with attach(model, pikv.RuntimeConfig(**parts, **far)) as host:
            pool = pikv.PagePool(host.model, host.runtime, capacity_bytes=needed // 2)
            cache = host.new_cache(pool=pool)
            said, far_s = decode(model, cache, ids, arguments.tokens)
            print(pool.use())
            foresight = cache.pikv.foresight
            print(f"foreseen: {foresight.hit_rate:.0%} of what was chosen; {foresight.precision:.0%} of it was chosen")
            print(f"hidden: {pool.use().hidden_of_right:.0%} of the time to fetch what was foreseen rightly")
    print(f"a token: {1e3 * near_s:.1f} ms with all pages near, {1e3 * far_s:.1f} ms with half of them far")
    agreeing = sum(one == other for one, other in zip(said, expected, strict=True))
    print(f"{agreeing} of {len(expected)} tokens are those of a cache that is all near")
    sys.exit(said != expected)


if __name__ == "__main__":
    main()
