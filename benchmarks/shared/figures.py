"""Plots of the benchmarks; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def against_context(
    series: Mapping[str, Sequence[tuple[int, float]]], label: str, output: Path, *, logarithmic: bool
) -> None:
    """Draw lines of (tokens, value) by name and save them; the format is that of the file's suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        style = {"linewidth": 2} if name.startswith("PiKV") else {"linewidth": 1, "linestyle": "--"}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
    axes.set_xscale("log", base=2)
    if logarithmic:
        axes.set_yscale("log")
    axes.set(xlabel="tokens of context", ylabel=label)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
