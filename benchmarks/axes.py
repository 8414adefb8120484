"""Axes of keys for low rank, fitted once on texts that the model was trained on: after rotary embedding, and before it.

Four texts of 2048 characters; the terminal is told how near their keys are to low rank.

    python benchmarks/axes.py --output /tmp/axes.pt --unrotated /tmp/unrotated.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from shared import small_model
from shared.small_model import Mixtral, generate_data

import pikv
from pikv.adapters.compressors import LowRank, UnrotatedLowRank, save_axes
from pikv.core.ports.transport import Solo

LENGTH, TEXTS, CHUNK = 2048, 4, 512


def main() -> None:
    """Read the texts and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=small_model.MODEL)
    parser.add_argument("--output", type=Path, required=True, help="axes after rotary embedding")
    parser.add_argument("--unrotated", type=Path, required=True, help="axes before it")
    arguments = parser.parse_args()

    model = Mixtral(arguments.model, Solo())
    text, rng = generate_data.standard_library(held_out=False), np.random.default_rng(0)
    ids = torch.from_numpy(generate_data.text_rows(text, rng, length=LENGTH, samples=TEXTS)).long()
    cache = pikv.PiKVCache(small_model.shape_of(model))
    small_model.read(model, cache, ids, CHUNK)
    views = [cache.view(layer_id) for layer_id in range(len(cache.model.layers))]
    for part, path in ((LowRank, arguments.output), (UnrotatedLowRank, arguments.unrotated)):
        compressors = part.calibrated(views, rank=1)
        save_axes([each.axes for each in compressors if each.axes is not None], path)
    for layer_id, view in enumerate(views):
        shares = [_shares(part.keys_of(view)) for part in (LowRank, UnrotatedLowRank)]
        print(f"layer {layer_id}: of the squares of keys in 8 axes of each head, after and before rotation: {shares}")


def _shares(keys: torch.Tensor) -> list[float]:
    """What the best 8 axes hold of keys [sequences, kv_heads, tokens, key_dim], head by head."""
    together = keys.transpose(0, 1).flatten(1, 2).double()
    squares = torch.linalg.eigvalsh(together.mT @ together)
    return [round(share, 3) for share in (squares[:, -8:].sum(1) / squares.sum(1)).tolist()]


if __name__ == "__main__":
    main()
