"""Many questions to one document: time to the first token and stored bytes, with the document's pages shared and not.

    python examples/prefix_sharing.py

The model is random, so this shows what is computed and stored, not what is answered. It needs pikv[transformers].
"""

from __future__ import annotations

import argparse
import statistics
import time

import attrs
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


@attrs.frozen(kw_only=True)
class Measured:
    """Seconds to each question's first token, sharing and alone, and the bytes that all caches stored in the end.

    alone_s: of the first questions, as many as were asked alone too; alone_bytes: of one such cache.
    """

    sharing_s: list[float]
    alone_s: list[float]
    sharing_bytes: int
    alone_bytes: int
    tail_bytes: int

    @property
    def later_s(self) -> float:
        """The median from the second question on, when the document is known."""
        return statistics.median(self.sharing_s[1:])


def measure(document_tokens: int, questions: int, alone: int) -> Measured:
    """Ask in turn of a pool that knows the document and, the first questions, of one that is told of nothing.

    Raises AssertionError unless both give the same logits.
    """
    torch.manual_seed(0)
    document = torch.randint(1, VOCABULARY, (1, document_tokens))
    model = random_model(document_tokens + 64)
    with attach(model) as host:
        known = pikv.PagePool(host.model, host.runtime)
        for _ in range(3):  # kernels are compiled when they first run, which is not what is measured
            ask(model, host.new_cache(prefix_from=known), with_question(document))
        shared, apart = (pikv.PagePool(host.model, host.runtime) for _ in range(2))
        sharing, sharing_s, alone_s = list[HostCache](), list[float](), list[float]()
        for number in range(questions):
            ids = with_question(document)
            sharing.append(host.new_cache(prefix_from=shared))
            logits, seconds = ask(model, sharing[-1], ids)
            sharing_s.append(seconds)
            if number < alone:
                lonely = host.new_cache(pool=apart)
                expected, seconds = ask(model, lonely, ids)
                alone_s.append(seconds)
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
                lonely_bytes = bytes_of(apart, [lonely])
                del lonely
        return Measured(
            sharing_s=sharing_s,
            alone_s=alone_s,
            sharing_bytes=bytes_of(shared, sharing),
            alone_bytes=lonely_bytes,
            tail_bytes=sum(cache.pikv.stored_bytes().tail for cache in sharing),
        )


def with_question(document: Tensor) -> Tensor:
    """The document and a question of 16 tokens."""
    return torch.cat([document, torch.randint(1, VOCABULARY, (1, 16))], dim=1)


def main() -> None:
    """Measure, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document-tokens", type=int, default=8192)
    parser.add_argument("--questions", type=int, default=8, help="2 or more")
    parser.add_argument("--alone", type=int, default=4, help="how many of them are asked alone too, 1 or more")
    arguments = parser.parse_args()
    if arguments.document_tokens < 1 or arguments.questions < 2 or arguments.alone < 1:
        parser.error("--document-tokens and --alone must be 1 or more, --questions 2 or more")
    measured = measure(arguments.document_tokens, arguments.questions, arguments.alone)
    print(f"{arguments.questions} questions to {arguments.document_tokens} tokens; the logits are the same to 1e-4")
    whole, later = statistics.median(measured.alone_s), measured.later_s
    print(f"first token: {whole:.3f} s alone, {later:.3f} s from the second question on ({whole / later:.1f}x)")
    each, together = arguments.questions * measured.alone_bytes, measured.sharing_bytes
    print(f"stored: {each / 1e6:.1f} MB alone, {together / 1e6:.1f} MB shared ({each / together:.1f}x)")


if __name__ == "__main__":
    main()
