"""The facts about a cache that is given to `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.generation.utils import GenerateOutput

from pikv.testing.transformers.comparison import assert_same_beams, assert_same_generation
from pikv.testing.transformers.hooks import LEFT, CacheHooks
from pikv.testing.transformers.models import VOCABULARY, cache_argument

NEVER = VOCABULARY  # no token


class GenerateConformance(CacheHooks):
    """Greedy, in turns, in chunks, from embeddings, by beams, with guesses."""

    def check_generate(self, *prompts: Tensor, mask: Tensor, **settings: Any) -> None:
        """Greedy generation gives the same tokens, each prompt being appended to what was said before."""
        for model in self.models():
            turns = zip(*self.both(model, partial(_turns, model, prompts, mask, **settings)), strict=True)
            for turn, (got, expected) in enumerate(turns):
                assert_same_generation(got, expected, self.logit_tolerance, f"{type(model).__name__}, turn {turn}")
                if not torch.equal(got.sequences, expected.sequences):
                    break  # by a tie: what is said next is about something else

    def test_greedy_generate(self) -> None:
        """`generate` says the same, 64 tokens on."""
        self.check_generate(_words(5), mask=torch.ones(1, 5), max_new_tokens=64)

    def test_generate_for_unequal_prompts(self) -> None:
        """Also for three prompts that are padded on the left."""
        self.check_generate(_words(8, 3), mask=_left_mask(8))

    def test_three_turns(self) -> None:
        """`generate` goes on from the same cache with what was said and something new, twice."""
        self.check_generate(_words(8, 3), _words(5, 3, seed=1), _words(1, 3, seed=2), mask=_left_mask(8))

    def test_prefill_in_chunks(self) -> None:
        """`prefill_chunk_size` changes nothing, whether or not it divides the prompt."""
        for size in (1, 3, 4):
            self.check_generate(_words(8, 3), mask=_left_mask(8), prefill_chunk_size=size)

    def test_generate_from_embeddings(self) -> None:
        """A prompt may come as `inputs_embeds`."""
        for model in self.models():
            embeddings = model.get_input_embeddings()(_words(8, 3)).detach()
            act = partial(_generate, model, None, _left_mask(8), inputs_embeds=embeddings)
            assert_same_generation(*self.both(model, act), self.logit_tolerance, type(model).__name__)

    def test_beam_search(self) -> None:
        """Four beams end with the same scores and the same tokens, for prompts of unequal lengths."""
        settings = {"num_beams": 4, "num_return_sequences": 3, "output_scores": True}
        for model in self.models():
            act = partial(_generate, model, _words(8, 3), _left_mask(8), **settings)
            assert_same_beams(*self.both(model, act), self.logit_tolerance, type(model).__name__)

    def test_assisted_generate(self) -> None:
        """Guesses taken from the prompt are cropped away where they were wrong, and the answer is the same."""
        prompt = _words(4).repeat(1, 4)
        # Older versions of transformers look guesses up only if there is a token that ends the text.
        self.check_generate(prompt, mask=torch.ones_like(prompt), prompt_lookup_num_tokens=3, eos_token_id=NEVER)


def _words(tokens: int, batch: int = 1, *, seed: int = 0) -> Tensor:
    """Random token ids int64 [batch, tokens]."""
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _left_mask(tokens: int) -> Tensor:
    """The attention mask int64 [3, tokens] of prompts of unequal lengths."""
    return (torch.arange(tokens) >= torch.tensor(LEFT)[:, None]).long()


def _generate(
    model: PreTrainedModel, ids: Tensor | None, mask: Tensor, cache: Cache, **settings: Any
) -> GenerateOutput:
    """Generate 8 tokens, greedily."""
    defaults = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **{**defaults, cache_argument(model): cache, **settings})


def _turns(
    model: PreTrainedModel, prompts: Sequence[Tensor], mask: Tensor, cache: Cache, **settings: Any
) -> list[GenerateOutput]:
    """Generate after each prompt, which follows all that was said before."""
    said, outputs = torch.zeros(len(mask), 0, dtype=torch.int64), []
    for prompt in prompts:
        said = torch.cat([said, prompt], -1)
        mask = torch.cat([mask, mask.new_ones(len(mask), said.shape[1] - mask.shape[1])], -1)
        outputs.append(_generate(model, said, mask, cache, **settings))
        said = outputs[-1].sequences
    return outputs
