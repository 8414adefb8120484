"""The small model as benchmarks use it: texts with hidden `@Qxy` lines, read in chunks and asked token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "downstream_tasks" / "models" / "tiny_moe"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "downstream_tasks" / "llm" / "next_tok_pred")]  # they are scripts

import generate_data  # noqa: E402  # found through the line above
from mixtral import Cache, Mixtral  # noqa: E402  # likewise

import pikv  # noqa: E402  # kept with the others

SEED = 77


@attrs.frozen
class Half:
    """A cache of float16 for a model that computes in float32."""

    cache: pikv.PiKVCache

    def update(self, layer_id: int, token_id: int, k: Tensor, v: Tensor) -> None:
        """See PiKVCache.update."""
        self.cache.update(layer_id, token_id, k.half(), v.half())

    def attend(self, layer_id: int, q: Tensor) -> Tensor:
        """See PiKVCache.attend."""
        return self.cache.attend(layer_id, q.half()).float()


def shape_of(model: Mixtral, dtype: torch.dtype = torch.float32) -> pikv.ModelConfig:
    """The shape of the model's cache."""
    config = model.config
    return pikv.ModelConfig(
        layers=config.layers,
        query_heads=config.query_heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        rotary=config.rotary,
        dtype=dtype,
    )


def batches(
    length: int, pairs: int, samples: int, batch: int, *, seed: int = SEED
) -> Iterator[list[generate_data.Sample]]:
    """Samples of held-out text, a batch at a time; all have the same length."""
    text = generate_data.standard_library(held_out=True)
    rng = np.random.default_rng(seed)
    for _ in range(0, samples, batch):
        yield [generate_data.recall_sample(text, rng, length=length, pairs=pairs) for _ in range(batch)]


def ids_of(samples: Sequence[generate_data.Sample]) -> Tensor:
    """Token ids, int64 [samples, tokens]."""
    return torch.from_numpy(np.stack([generate_data.token_ids(sample.text) for sample in samples])).long()


def read(model: Mixtral, cache: Cache, ids: Tensor, chunk: int) -> None:
    """Read a prompt ids [batch, tokens], so many tokens at a time."""
    for first in range(0, ids.shape[1], chunk):
        model.step(ids[:, first : first + chunk], first, cache)


def answers(model: Mixtral, cache: Cache, ids: Tensor, sample: generate_data.Sample) -> Tensor:
    """Ask token by token what a sample asks, after the cache has read what comes before; whose values were right.

    ids: [batch, tokens], of texts whose answers stand where the sample's do. Returns bool [batch, pairs].
    """
    best = torch.full_like(ids, -1)  # best[:, i]: the most likely token at place i
    for place in range(sample.question_start, ids.shape[1] - 1):
        best[:, place + 1] = model.step(ids[:, place : place + 1], place, cache).argmax(-1)
    return torch.stack([(best[:, span] == ids[:, span]).all(1) for span in sample.answers], dim=1)
