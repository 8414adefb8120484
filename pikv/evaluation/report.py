"""What came out: a row for each contestant and task, as a Markdown table, as CSV and as plots."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import attrs

from pikv.evaluation.items import Task
from pikv.evaluation.run import Score
from pikv.evaluation.statistics import Interval, loss, quality


@attrs.frozen(kw_only=True)
class Row:
    """A contestant on a task, beside the full cache on the same items.

    quality: percent of the answers that are right, or bits a token; lost: against the full cache, at 95 %. stored,
    tail: bytes when the questions began, as shares of the full cache's; stored includes the tail. read: the share of
    the full cache's bytes that each token of a question reads of sealed pages and indexes.
    """

    task: str
    contestant: str
    items: int
    judged_by: str
    quality: float
    lost: float
    half_width: float
    stored: float
    tail: float
    read: float


def row_of(task: Task, contestant: str, scores: Mapping[int, Score], full: Mapping[int, Score]) -> Row:
    """Compare scores with the full cache's on the items that both have."""
    both = sorted(scores.keys() & full.keys())
    own, whole = [scores[item] for item in both], [full[item] for item in both]
    lost: Interval = loss(own, whole, task.judged_by)
    everything = sum(score.stored for score in whole)
    stored, tail = (sum(getattr(score, name) for score in own) / everything for name in ("stored", "tail"))
    read = sum(score.read * (score.stored - score.tail) for score in own) / everything
    return Row(
        task=task.name,
        contestant=contestant,
        items=len(both),
        judged_by=task.judged_by,
        quality=quality(own, task.judged_by),
        lost=lost.value,
        half_width=lost.half_width,
        stored=stored,
        tail=tail,
        read=read,
    )


def on_front(rows: Sequence[Row], axis: str) -> list[bool]:
    """Which rows of one task no other beats in quality at as few bytes or fewer. axis: "stored" or "read"."""

    def beaten(row: Row) -> bool:
        def better(other: Row) -> bool:
            bytes_, own = getattr(other, axis), getattr(row, axis)
            return other.lost <= row.lost and bytes_ <= own and (other.lost < row.lost or bytes_ < own)

        return any(better(other) for other in rows)

    return [not beaten(row) for row in rows]


def by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each task, in their order."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def markdown(rows: Iterable[Row], heading: str) -> str:
    """Tables, one a task; a star marks what is on the front of quality against stored bytes."""
    parts = [heading]
    for task, group in by_task(rows).items():
        bits = group[0].judged_by == "bits"
        unit = "bits a token" if bits else "right, %"
        lines = [
            f"### {task}",
            "",
            f"| contestant | {unit} | lost | stored | of which tail | read | items |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        digits = 3 if bits else 1
        for row, best in zip(group, on_front(group, "stored"), strict=True):
            lines.append(
                f"| {row.contestant}{' *' if best else ''} | {row.quality:.{digits}f} | {row.lost:.{digits}f} ± "
                f"{row.half_width:.{digits}f} | {row.stored:.3f} | {row.tail:.3f} | {row.read:.3f} | {row.items} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def save_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in attrs.fields(Row))
        writer.writerows(map(attrs.astuple, rows))


def plot(rows: Sequence[Row], axis: str, path: Path) -> None:
    """Quality against bytes, the front as a line; one panel a task. axis: "stored" or "read". Needs matplotlib."""
    from matplotlib.figure import Figure  # here, since only plots need it

    tasks = by_task(rows)
    figure = Figure(figsize=(6.5 * len(tasks), 5), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, group) in zip(panels, tasks.items(), strict=True):
        for row in group:
            share = 100 * getattr(row, axis)
            axes.errorbar(share, row.quality, yerr=row.half_width, marker="o", capsize=2, linestyle="none")
            axes.annotate(row.contestant, (share, row.quality), fontsize=7, xytext=(4, 4), textcoords="offset points")
        best = sorted(
            (row for row, is_best in zip(group, on_front(group, axis), strict=True) if is_best),
            key=lambda row: float(getattr(row, axis)),
        )
        axes.plot([100 * getattr(row, axis) for row in best], [row.quality for row in best], linewidth=1, color="0.5")
        axes.set(title=task, xscale="log", xlabel=f"bytes {axis}, % of the full cache")
        axes.set_ylabel("bits a token" if group[0].judged_by == "bits" else "right, %")
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
