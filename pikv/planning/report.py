"""Plans as a Markdown table, and as a plot of bytes against context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pikv.compositions import Composition
from pikv.planning.rows import PlanRow, Wire, Workload

MIB, GIB = 2**20, 2**30


def markdown(work: Workload, cached: str, rows: Sequence[PlanRow], across: Wire | None) -> str:
    """The plan of one way to cache the model, such as its latents."""
    unit, name = (GIB, "GiB") if max(row.cache_bytes for row in rows) >= GIB else (MIB, "MiB")
    columns = {
        "composition": [row.composition for row in rows],
        f"{name} a rank": [f"{row.cache_bytes / unit:.2f}" for row in rows],
        "of full": [f"{row.share:.3f}" for row in rows],
        "sequences that fit": [_count(row.most_sequences) for row in rows],
        "longest context": [_count(row.longest_context) for row in rows],
        "ms a token": [_number(row.token_ms) for row in rows],
        "of it cache": [_number(row.cache_ms) for row in rows],
        "ms to fetch": [_number(row.fetch_ms) for row in rows],
        "ms to recompute": [_number(row.recompute_ms) for row in rows],
        "quicker": [_quicker(row) for row in rows],
    }
    told = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [_line(told), _line(["---"] + ["---:"] * (len(told) - 1)), *map(_line, zip(*told.values(), strict=True))]
    return "\n".join([_heading(work, cached), "", *lines, *_wire(across)]) + "\n"


def layers(rows: Iterable[PlanRow]) -> str:
    """MiB of each layer, all ranks together."""
    rows = list(rows)
    lines = [_line(["layer", *(row.composition for row in rows)]), _line(["---:"] * (len(rows) + 1))]
    for layer_id, cells in enumerate(zip(*(row.layer_bytes for row in rows), strict=True)):
        lines.append(_line([str(layer_id), *(f"{nbytes / MIB:.2f}" for nbytes in cells)]))
    return "\n".join(lines) + "\n"


def plot(work: Workload, compositions: Iterable[Composition], path: Path) -> None:
    """Bytes of one rank against context, with the memory that weights leave. Needs matplotlib (pikv[plots])."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "pikv"
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    contexts = [max(1, work.tokens * step // 16) for step in range(1, 33)]
    for composition in compositions:
        totals = [work.cache(composition, tokens=tokens).total / work.machines.ranks / GIB for tokens in contexts]
        axes.plot(contexts, totals, label=composition.text)
    if work.machines.memory_bytes is not None:
        free = work.machines.memory_bytes - work.machines.weight_bytes(work.shape.parameters)
        axes.axhline(free / GIB, color="black", linestyle=":", label="beside the weights")
    axes.axvline(work.tokens, color="grey", linewidth=0.8)
    axes.set(
        xlabel="tokens of context", ylabel="GiB a rank", title=f"{work.shape.name}, batch {work.batch}", ylim=(0, None)
    )
    axes.legend()
    figure.savefig(path)


def _heading(work: Workload, cached: str) -> str:
    shape, machines = work.shape, work.machines
    size, active = shape.parameters / 1e9, shape.active_parameters / 1e9
    weights = machines.weight_bytes(shape.parameters) / GIB
    ranks = f" on each of {machines.ranks} ranks" if machines.ranks > 1 else ""
    return (
        f"{shape.name}: {size:.1f} billion parameters, {active:.1f} active, {weights:.1f} GiB of weights{ranks}; "
        f"{work.batch} x {work.tokens} tokens, {cached} in {str(work.model.dtype).removeprefix('torch.')}"
    )


def _wire(across: Wire | None) -> list[str]:
    if across is None:
        return []
    experts, queries, pages = (nbytes / MIB for nbytes in (across.experts, across.queries, across.pages))
    return [
        "",
        f"Between ranks, a step of the batch: {experts:.2f} MiB to experts and back, {queries:.2f} MiB of queries to "
        f"pages and answers back; pages to queries would be {pages:.2f} MiB (first composition).",
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}".replace(",", " ")


def _quicker(row: PlanRow) -> str:
    if row.fetch_ms is None or row.recompute_ms is None:
        return ""
    return "fetch" if row.fetch_ms < row.recompute_ms else "recompute"


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.0f}" if number >= 100 else f"{number:.3g}"
