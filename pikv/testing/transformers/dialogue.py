"""A program's operations, done to a model that has the cache."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pikv.testing.transformers.models import VOCABULARY, cache_argument
from pikv.testing.transformers.operations import Program


@attrs.define
class ModelDialogue:
    """Tokens are shown to a model that has the cache. What comes of it is logits."""

    model: PreTrainedModel
    cache: Cache
    mask: Tensor
    random: torch.Generator

    @classmethod
    def start(cls, model: PreTrainedModel, cache: Cache, program: Program) -> ModelDialogue:
        """Nothing was shown yet."""
        return cls(model, cache, program.no_tokens(), program.random())

    def show(self, real: Tensor) -> list[Tensor]:
        """Call the model once; the logits float32 [tokens, vocabulary] of tokens that are no padding."""
        ids = torch.randint(1, VOCABULARY, real.shape, generator=self.random)  # padding is any token, to be ignored
        self.mask = torch.cat([self.mask, real], -1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -real.shape[1] :]
        named = {cache_argument(self.model): self.cache}
        with torch.no_grad():
            logits = self.model(ids, attention_mask=self.mask, position_ids=positions, **named).logits
        return [logits[real.bool()].float()]
