"""Many questions to one document: time to the first token and stored bytes, with the document's pages shared and not.

    python examples/prefix_sharing.py

The model is random, so this shows what is computed and stored, not what is answered. It needs pikv[transformers].
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers
from torch import Tensor

import pikv
from pikv.adapters.transformers import HostCache, attach

VOCABULARY = 1000


def random_model(tokens: int) -> transformers.PreTrainedModel:
    """A Llama of 4 layers that takes so many tokens."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def ask(model: transformers.PreTrainedModel, cache: HostCache, ids: Tensor) -> tuple[Tensor, float]:
    """The logits of the first token of an answer, and the seconds that it took."""
    start = time.perf_counter()
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return said.logits[0], time.perf_counter() - start


def bytes_of(pool: pikv.PagePool, caches: list[HostCache]) -> int:
    """The pages of a pool, each once, and the tails of the caches."""
    return pool.used_bytes + sum(cache.pikv.stored_bytes().tail for cache in caches)


def main() -> None:
    """Ask each question twice, in turn: of a pool that knows the document, and of one that is told of nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document-tokens", type=int, default=8192)
    parser.add_argument("--questions", type=int, default=8, help="2 or more")
    arguments = parser.parse_args()
    if arguments.document_tokens < 1 or arguments.questions < 2:
        parser.error("--document-tokens must be 1 or more, --questions 2 or more")
    torch.manual_seed(0)
    document = torch.randint(1, VOCABULARY, (1, arguments.document_tokens))
    model = random_model(arguments.document_tokens + 64)
    with attach(model) as host:
        known = pikv.PagePool(host.model, host.runtime)
        for _ in range(2):  # kernels are compiled when they first run, which is not what is measured
            ask(model, host.new_cache(prefix_from=known), document)
        shared, apart = (pikv.PagePool(host.model, host.runtime) for _ in range(2))
        sharing, alone, seconds = list[HostCache](), list[HostCache](), list[tuple[float, float]]()
        for _ in range(arguments.questions):
            ids = torch.cat([document, torch.randint(1, VOCABULARY, (1, 16))], dim=1)
            sharing.append(host.new_cache(prefix_from=shared))
            alone.append(host.new_cache(pool=apart))
            (with_prefix, fast), (without, slow) = ask(model, sharing[-1], ids), ask(model, alone[-1], ids)
            torch.testing.assert_close(with_prefix, without, atol=1e-4, rtol=1e-4)
            seconds.append((fast, slow))
        print(f"{arguments.questions} questions to {arguments.document_tokens} tokens; the logits are the same to 1e-4")
        later, whole = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
        print(f"first token: {whole:.3f} s alone, {later:.3f} s from the second question on ({whole / later:.1f}x)")
        together, each = bytes_of(shared, sharing), bytes_of(apart, alone)
        print(f"stored: {each / 1e6:.1f} MB alone, {together / 1e6:.1f} MB shared ({each / together:.1f}x)")


if __name__ == "__main__":
    main()
