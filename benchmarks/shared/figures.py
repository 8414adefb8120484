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


def against_bytes(panels: Mapping[str, Sequence[tuple[float, float, str]]], label: str, output: Path) -> None:
    """Draw points of (share of the bytes, value, name), a panel a key; the Pareto front is a line, and named."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        front = pareto(points)
        axes.scatter([point[0] for point in points], [point[1] for point in points], s=10, color="0.6")
        axes.step([point[0] for point in front], [point[1] for point in front], where="post", marker="o", markersize=4)
        for share, value, name in front:
            axes.annotate(name, (share, value), rotation=-30, fontsize=6, xytext=(3, -4), textcoords="offset points")
        axes.set_xscale("log")
        axes.set(title=title, xlabel="stored bytes, a share of the float16 dense cache", ylabel=label)
        axes.grid(alpha=0.3)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def pareto(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The points than which none is both smaller and better, by size."""
    front: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front
