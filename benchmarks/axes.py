"""How near a small model's keys are to low rank, after rotary embedding and before it; and axes for low rank.

Axes are fitted once on texts that the model was trained on, and looked at on texts that were held out. The table has
the share of the keys' squares that the first few axes hold: of each text's own axes, and of the calibrated ones.

    python benchmarks/axes.py --axes /tmp/axes.pt --unrotated /tmp/unrotated.pt --output docs/tables/axes.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from shared import small_model, tables
from shared.small_model import Mixtral, generate_data
from torch import Tensor

import pikv
from pikv.adapters.compressors import Axes, LowRank, UnrotatedLowRank, save_axes
from pikv.core.ports.transport import Solo
from pikv.core.views import TokenView

LENGTH, TEXTS, CHUNK = 2048, 4, 512
RANKS = (4, 8, 16)
PARTS = {"after": LowRank, "before": UnrotatedLowRank}


def views_of(model: Mixtral, *, held_out: bool) -> list[TokenView]:
    """What the layers of an exact cache hold of some texts."""
    text, rng = generate_data.standard_library(held_out=held_out), np.random.default_rng(0)
    ids = torch.from_numpy(generate_data.text_rows(text, rng, length=LENGTH, samples=TEXTS)).long()
    cache = pikv.PiKVCache(small_model.shape_of(model))
    small_model.read(model, cache, ids, CHUNK)
    return [cache.view(layer_id) for layer_id in range(len(cache.model.layers))]


def shares(keys: Tensor, columns: Tensor) -> list[float]:
    """Percent of the squares of keys [sequences, kv_heads, tokens, dim] in the first RANKS columns [.., dim, dim]."""
    squares = (keys @ columns).double().square().sum((0, 1, 2))
    return [100 * float(squares[:rank].sum() / squares.sum()) for rank in RANKS]


def rows(calibrated: dict[str, list[Axes]], views: list[TokenView]) -> Iterator[list[object]]:
    """A row for each layer, and for keys after and before rotary embedding."""
    for layer_id, view in enumerate(views):
        for when, part in PARTS.items():
            keys, common = part.keys_of(view).float(), calibrated[when][layer_id].columns
            own = [Axes.of(keys[i : i + 1], view.positions[i : i + 1]).columns for i in range(len(keys))]
            each = [f"{share:.1f}" for share in (*shares(keys, torch.stack(own)), *shares(keys, common))]
            yield [layer_id, when, *each]


def main() -> None:
    """Fit, write both files of axes, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=small_model.MODEL)
    parser.add_argument("--axes", type=Path, required=True, help="a file for axes after rotary embedding")
    parser.add_argument("--unrotated", type=Path, required=True, help="a file for axes before it")
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    arguments = parser.parse_args()

    model = Mixtral(arguments.model, Solo())
    fitted = views_of(model, held_out=False)
    calibrated = {
        when: [Axes.of(part.keys_of(view), view.positions) for view in fitted] for when, part in PARTS.items()
    }
    for when, path in (("after", arguments.axes), ("before", arguments.unrotated)):
        save_axes(calibrated[when], path)
    head_dim = fitted[0].layer.key_dim
    said = (
        f"Percent of the squares of keys of {head_dim} channels that the first {', '.join(map(str, RANKS))} axes hold, "
        f"after rotary embedding and before it: {TEXTS} held-out texts of {LENGTH} characters, all KV heads of a layer "
        f"together. Own: axes of each text and KV head; calibrated: those of {TEXTS} texts that the model was trained "
        "on."
    )
    columns = ["layer", "keys", *(f"own, {rank}" for rank in RANKS), *(f"calibrated, {rank}" for rank in RANKS)]
    table = tables.markdown(columns, rows(calibrated, views_of(model, held_out=True)))
    tables.save("\n\n".join([said, tables.command(), table]), arguments.output)


if __name__ == "__main__":
    main()
