"""Assemble an own cache: a budget shared out over the layers, an own rule for what stays, chosen pages, 8-bit pages.

    python examples/custom_pipeline.py

The keys, values and queries are random, so this shows how the parts fit and what they store, not how well a model
answers; the tables in docs/ do that.
"""

from __future__ import annotations

import argparse

import attrs
import torch
from torch import Tensor

import pikv
from pikv.adapters.compressors import Int8
from pikv.core.ports import TokenSelector
from pikv.core.views import TokenView
from pikv.policies import Pyramid, Quest

MODEL = pikv.ModelConfig(layers=8, query_heads=8, kv_heads=2, head_dim=64)


@attrs.frozen(kw_only=True)
class KeyNorm(TokenSelector):
    """Keep the tokens with the shortest keys, which tend to draw attention. Source: arXiv 2406.11430."""

    sinks: int = 4
    recent: int = 64

    def score(self, view: TokenView) -> Tensor:
        """[sequences, kv_heads, tokens]; the lowest leave first."""
        return -view.keys.norm(dim=-1)


def random_step(caches: list[pikv.PiKVCache], position: int, tokens: int) -> list[Tensor]:
    """Give every cache the same new tokens in all layers; returns what each attends to in the last."""
    outputs: list[Tensor] = []
    for layer_id, layer in enumerate(MODEL.layers):
        k, v = torch.randn(2, 1, layer.kv_heads, tokens, layer.key_dim)
        q = torch.randn(1, layer.query_heads, tokens, layer.key_dim)
        for cache in caches:
            cache.update(layer_id, position, k, v)
        outputs = [cache.attend(layer_id, q) for cache in caches]
    return outputs


def main() -> None:
    """Fill an exact cache and an own one with the same prompt, decode, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--decode-tokens", type=int, default=64, help="1 or more")
    parser.add_argument("--budget-tokens", type=int, default=1024, help="mean tokens a layer and KV head keeps")
    arguments = parser.parse_args()
    if arguments.prompt_tokens < 1 or arguments.decode_tokens < 1:
        parser.error("--prompt-tokens and --decode-tokens must be 1 or more")
    torch.manual_seed(0)

    exact = pikv.PiKVCache(MODEL)
    try:
        own = pikv.compose(
            MODEL,
            allocator=Pyramid(),  # early layers keep more
            token_selector=KeyNorm(),  # which tokens stay
            page_selector=Quest(pages=8),  # which pages a query reads
            compressor=Int8(),  # how a page is stored
            budget_tokens=arguments.budget_tokens,
        )
    except pikv.ConfigError as error:
        parser.error(str(error))
    for start in range(0, arguments.prompt_tokens, 512):
        random_step([exact, own], start, min(512, arguments.prompt_tokens - start))
    for position in range(arguments.prompt_tokens, arguments.prompt_tokens + arguments.decode_tokens):
        wanted, got = random_step([exact, own], position, 1)

    print(own.describe(), end="\n\n")
    kept = [int(own.retrieve(layer_id).mask.sum(-1).float().mean()) for layer_id in range(len(MODEL.layers))]
    print(f"tokens kept, layer by layer  {kept}")
    print(f"exact                        {exact.stored_bytes()}")
    print(f"own                          {own.stored_bytes()}")
    print(f"cosine of the last outputs   {torch.cosine_similarity(wanted.flatten(), got.flatten(), dim=0):.3f}")


if __name__ == "__main__":
    main()
