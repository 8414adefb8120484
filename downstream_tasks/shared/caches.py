"""Reading prompts into a composed cache, and answering from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from downstream_tasks.shared.errors import TaskError
from downstream_tasks.shared.examples import Example
from pikv.adapters.transformers import Host, HostCache
from pikv.compose import build
from pikv.compositions import Composition, parse
from pikv.core.config import ModelConfig

FULL = "exact"
DEFAULTS = ("int8", "int4", "int2", "recent@1/4", "snapkv(window=16)@1/4", "pyramid+snapkv(window=16)+int4@1/10")
PAGE_SIZE, TAIL_TOKENS = 16, 16  # the tasks' prompts are some hundred tokens
BATCH = 16  # prompts read at a time


def compositions(asked: Sequence[str] | None) -> list[Composition]:
    """What --cache names, the full cache first. A file has a composition a line; `#` starts a comment."""
    texts = [FULL]
    for text in DEFAULTS if asked is None else asked:
        lines = Path(text).read_text().splitlines() if Path(text).is_file() else [text]
        texts += [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    return [parse(text) for text in dict.fromkeys(texts)]


def names_for(composition: Composition, model: ModelConfig, *, tokens: int) -> dict[str, Any]:
    """The composition for prompts of so many tokens.

    With pages of 16 tokens and an exact tail of 16, or of the selector's window, unless it says otherwise.
    """
    selector = build("token_selector", composition.names.get("token_selector", "keep_all"))
    tail = max(TAIL_TOKENS, selector.recent)
    sizes = {"page_size": PAGE_SIZE, "tail_tokens": tail}
    return attrs.evolve(composition, names={**sizes, **composition.names}).names_for(model, tokens)


@attrs.frozen
class Read:
    """Prompts that were read into a cache, all but their last token, and what to go on with.

    last: [batch, 1]. mask: [batch, longest prompt], 0 for the padding on the left. nbytes: that the cache holds.
    """

    cache: HostCache
    last: Tensor
    mask: Tensor
    nbytes: int


class Reader:
    """Reads batches of prompts into caches of a host, cut and sealed when all but the last token was read."""

    def __init__(self, model: Any, host: Host, *, pad: int) -> None:
        self._model, self._host, self._pad = model, host, pad

    def batches(self, examples: Sequence[Example]) -> Iterator[tuple[Sequence[Example], Read]]:
        """Prompts of about the same length together, so that there is little padding."""
        ordered = sorted(examples, key=lambda example: len(example.prompt))
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            yield batch, self._read([example.prompt for example in batch])

    def step(self, read: Read, token: Tensor, mask: Tensor) -> Tensor:
        """Logits [batch, new tokens, vocabulary] after tokens [batch, new tokens] that follow what was read."""
        positions = mask.cumsum(-1)[:, -token.shape[1] :] - 1
        output = self._model(input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=read.cache)
        return output.logits.float()

    def _read(self, prompts: Sequence[Sequence[int]]) -> Read:
        longest = max(map(len, prompts))
        if min(map(len, prompts)) < 2:
            raise TaskError("a prompt must have at least 2 tokens, one of them to be read into the cache")
        device = self._model.device
        ids = torch.full((len(prompts), longest), self._pad, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, longest - len(prompt) :] = 1
        cache = self._host.new_cache()
        seen = mask[:, :-1]
        self._model(
            input_ids=ids[:, :-1],
            attention_mask=seen,
            position_ids=(seen.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache.pikv.finish_prefill()
        return Read(cache, ids[:, -1:], mask, cache.pikv.stored_bytes().total)


def more(mask: Tensor) -> Tensor:
    """A mask [batch, tokens] for one token more."""
    return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
