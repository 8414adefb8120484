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


def lines(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], across: str, up: str, output: Path
) -> None:
    """Draw a panel for each name, of lines of (x, y) by name, and save them; the format is that of the file's suffix.

    across, up: the labels of both axes. A line of one point is drawn across its panel.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels) + 3, 5), layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, series) in zip(drawn, panels.items(), strict=True):
        for number, (name, points) in enumerate(series.items()):
            if len(points) == 1:
                axes.axhline(points[0][1], color="gray", linestyle="--", linewidth=1, label=name)
            else:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=f"C{number}", label=name)
        axes.set(title=title, xlabel=across, ylabel=up)
        axes.grid(alpha=0.3)
    figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
