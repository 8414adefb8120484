"""One decode step of one layer: time against context, for PiKV and for what else attends on a CPU.

Caches are filled with random keys and values, not prefilled with attention. PiKV is called through `cache.attend`, all
overhead in. Contestants take turns in one process and read cold copies (see shared/timing.py), in panels: each holds
PiKV in float32, so that every ratio is between times taken side by side.

    python benchmarks/decode.py --tables docs/tables --figures docs/figures
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from shared import figures, tables, timing
from shared.timing import Contestant
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from tqdm import tqdm

import pikv

QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PAGE_SIZE, TAIL_TOKENS = 64, 128
READ_TOKENS = 2048  # by Quest, of all
CHUNK = 4096  # tokens of an update while a cache is filled
MOST_TOKENS = 1 << 19  # batch * tokens
CONTEXTS, BATCHES = (2048, 8192, 32_768, 131_072), (1, 4, 16)
QUEST = {"name": "quest", "pages": READ_TOKENS // PAGE_SIZE, "dense_layers": 0}
REFERENCE = "PiKV float32"


@attrs.frozen
class Size:
    """Sequences, and tokens of each."""

    batch: int
    tokens: int


@attrs.frozen(kw_only=True)
class Row:
    """A line of the result."""

    panel: str
    batch: int
    tokens: int
    name: str
    ms: float
    ratio: float  # how many times faster than PiKV in float32
    nbytes: int
    read_ms: float
    fraction: float


# --- PiKV


def composed(dtype: torch.dtype = torch.float32, **names: Any) -> Callable[[str, Size], Contestant]:
    """A maker of contestants: PiKV with these parts."""

    def make(name: str, size: Size) -> Contestant:
        one = pikv.ModelConfig(layers=1, query_heads=QUERY_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype)
        runtime = pikv.runtime_from({"page_size": PAGE_SIZE, "tail_tokens": TAIL_TOKENS, **names}, one)
        rows = size.batch * KV_HEADS * size.tokens // PAGE_SIZE
        layers = timing.copies_for(rows * runtime.form(one, 0).stride)
        cache = pikv.PiKVCache(pikv.ModelConfig.of(one.layers * layers, dtype=dtype), runtime)
        fill(cache, size, dtype)
        queries = torch.randn(timing.CALLS, size.batch, QUERY_HEADS, 1, HEAD_DIM, dtype=dtype)
        return Contestant(
            name=name,
            run=lambda copy: cache.attend(copy % layers, queries[copy % timing.CALLS]),
            copies=layers if runtime.page_selector is None else timing.CALLS,  # other queries choose other pages
            nbytes=bytes_read(cache, size) // layers,
        )

    return make


def fill(cache: pikv.PiKVCache, size: Size, dtype: torch.dtype) -> None:
    """Random tokens in every layer, the last of which comes alone, as in decoding."""
    for layer_id in range(len(cache.model.layers)):
        keys, values = torch.randn(2, size.batch, KV_HEADS, min(CHUNK, size.tokens), HEAD_DIM, dtype=dtype)
        for start in range(0, size.tokens - 1, CHUNK):
            tokens = min(CHUNK, size.tokens - 1 - start)
            keys = keys.roll(1, 0) * torch.empty((), dtype=dtype).uniform_(0.9, 1.1)  # no two chunks alike
            cache.update(layer_id, start, keys[:, :, :tokens], values[:, :, :tokens])
    for layer_id in range(len(cache.model.layers)):
        cache.update(layer_id, size.tokens - 1, keys[:, :, :1], values[:, :, :1])
        cache.attend(layer_id, torch.randn(size.batch, QUERY_HEADS, 1, HEAD_DIM, dtype=dtype))


def bytes_read(cache: pikv.PiKVCache, size: Size) -> int:
    """What one query reads, in all layers: everything, or the indexes and the pages chosen."""
    stored, selector = cache.stored_bytes(), cache.runtime.page_selector
    if selector is None:
        return stored.total
    sealed = (size.tokens - TAIL_TOKENS) // PAGE_SIZE
    return stored.total - stored.pages + stored.pages * min(selector.pages, sealed) // sealed


# --- what else attends


def folded(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """SDPA with the query heads of a group as if they were tokens: each key is read once for all of them."""
    return F.scaled_dot_product_attention(query.view(-1, KV_HEADS, QUERY_HEADS // KV_HEADS, HEAD_DIM), keys, values)


def grouped(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def matmul(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    query = query.view(-1, KV_HEADS, QUERY_HEADS // KV_HEADS, HEAD_DIM) * HEAD_DIM**-0.5
    return torch.matmul(torch.matmul(query, keys.mT).softmax(-1), values)


_compiled_flex = torch.compile(flex_attention, dynamic=True)


def flex(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return _compiled_flex(query, keys, values, enable_gqa=True)  # type: ignore[no-any-return]


TORCH = {
    "torch SDPA, folded group": folded,
    "torch SDPA, enable_gqa": grouped,
    "torch matmul": matmul,
    "torch flex attention": flex,
}


def dense(size: Size, dtype: torch.dtype) -> Iterator[Contestant]:
    """What torch has, all on the same keys and values; a form that cannot run is named with the reason."""
    shape = (2, size.batch, KV_HEADS, size.tokens, HEAD_DIM)
    nbytes = 2 * size.batch * KV_HEADS * size.tokens * HEAD_DIM * dtype.itemsize
    copies = [torch.randn(shape, dtype=dtype) for _ in range(timing.copies_for(nbytes))]
    query = torch.randn(size.batch, QUERY_HEADS, 1, HEAD_DIM, dtype=dtype)
    for name, attention in TORCH.items():
        try:
            attention(query, *copies[0])
        except Exception as error:  # flex attention needs a C++ compiler, and may meet any trouble with it
            tqdm.write(f"{name}, {dtype}: skipped, {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        run = _on_copies(attention, query, copies)
        yield Contestant(name=f"{name} {_short(dtype)}", run=run, copies=len(copies), nbytes=nbytes)


def _on_copies(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, copies: list[Tensor]
) -> Callable[[int], Tensor]:
    return lambda copy: attention(query, *copies[copy])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- panels


@attrs.frozen
class Panel:
    """What is measured side by side with PiKV in float32: compositions by name, and torch on these dtypes."""

    composed: dict[str, Callable[[str, Size], Contestant]]
    dense: tuple[torch.dtype, ...] = ()

    def contestants(self, size: Size) -> Iterable[Contestant]:
        for name, make in self.composed.items():
            yield make(name, size)
        for dtype in self.dense:
            yield from dense(size, dtype)


PANELS = {
    "float32": Panel({}, (torch.float32,)),
    "half precision": Panel(
        {"PiKV float16": composed(torch.float16), "PiKV bfloat16": composed(torch.bfloat16)},
        (torch.float16, torch.bfloat16),
    ),
    "codes": Panel({f"PiKV INT{bits}": composed(compressor=f"int{bits}") for bits in (8, 4, 2)}),
    f"{READ_TOKENS} tokens read": Panel(
        {
            "PiKV float32, Quest": composed(page_selector=QUEST),
            "PiKV INT8, Quest": composed(compressor="int8", page_selector=QUEST),
            "PiKV INT4, Quest": composed(compressor="int4", page_selector=QUEST),
        }
    ),
}


def measure(
    name: str, reference: Contestant, size: Size, plain: timing.PlainRead, rounds: int, progress: tqdm
) -> list[Row]:
    """One panel at one size."""
    contestants = [reference, *PANELS[name].contestants(size)]
    progress.total += len(contestants) * rounds
    times = timing.interleaved(contestants, plain, rounds, progress)
    return [
        Row(
            panel=name,
            batch=size.batch,
            tokens=size.tokens,
            name=contestant.name,
            ms=time.ms,
            ratio=times[reference.name].ms / time.ms,
            nbytes=contestant.nbytes,
            read_ms=time.read_ms,
            fraction=time.fraction,
        )
        for contestant in contestants
        for time in [times[contestant.name]]
    ]


# --- reports


def report(rows: list[Row], arguments: argparse.Namespace) -> str:
    """A Markdown table for each size."""
    lines = [
        f"One decode step of one layer: {QUERY_HEADS} query heads, {KV_HEADS} KV heads, head_dim {HEAD_DIM}, page_size "
        f"{PAGE_SIZE}, tail_tokens {TAIL_TOKENS}; medians over {arguments.rounds} rounds of "
        f"{timing.TIMED_CALLS} cold reads. Bytes are what a query reads: of PiKV `stored_bytes()` of a layer, by Quest "
        "its index, the pages chosen and the tail. Fraction: the time of a plain read of as many bytes, over the time. "
        "Ratio: how many times faster than PiKV in float32, measured beside it.",
        "",
        f"{tables.machine()}.",
        "",
        tables.command(),
    ]
    for size in dict.fromkeys(Size(row.batch, row.tokens) for row in rows):
        lines += ["", f"### Batch {size.batch}, {size.tokens} tokens", ""]
        columns = ("panel", "contestant", "ms", "ratio", "MB read", "fraction of a plain read")
        body = [
            (row.panel, row.name, f"{row.ms:.3f}", f"{row.ratio:.2f}", f"{row.nbytes / 1e6:.1f}", f"{row.fraction:.2f}")
            for row in rows
            if (row.batch, row.tokens) == (size.batch, size.tokens)
        ]
        lines.append(tables.markdown(columns, body).rstrip())
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], folder: Path) -> None:
    """Time, and the fraction of a plain read, against context; one sequence."""
    single = [row for row in rows if row.batch == 1]
    lines = {name: [row for row in single if row.name == name] for name in dict.fromkeys(row.name for row in single)}
    for quantity, label in (("ms", "ms a step"), ("fraction", "fraction of a plain read")):
        series = {name: [(row.tokens, getattr(row, quantity)) for row in line] for name, line in lines.items()}
        figures.against_context(series, label, folder / f"decode_{quantity}.svg", logarithmic=quantity == "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="a folder for decode.md and decode.csv; the terminal by default")
    parser.add_argument("--figures", type=Path, help="a folder for plots (needs matplotlib); none by default")
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--contexts", type=int, nargs="*", default=list(CONTEXTS), help="tokens of a sequence")
    parser.add_argument("--panels", nargs="*", default=list(PANELS), choices=list(PANELS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one sequence of 2048 and 8192 tokens, two rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batches, arguments.contexts, arguments.rounds = [1], [2048, 8192], 2
    timing.set_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = [Size(batch, tokens) for batch in arguments.batches for tokens in arguments.contexts]
    rows, plain = [], timing.PlainRead()
    with tqdm(total=0) as progress:
        for size in sizes:
            if size.batch * size.tokens > MOST_TOKENS:
                tqdm.write(f"batch {size.batch}, {size.tokens} tokens: skipped, more than {MOST_TOKENS} together")
                continue
            reference = composed()(REFERENCE, size)
            for panel in arguments.panels:
                rows += measure(panel, reference, size, plain, arguments.rounds, progress)
            _save(rows, arguments)
    print(report(rows, arguments))
    if arguments.figures:
        plot(rows, arguments.figures)


def _save(rows: list[Row], arguments: argparse.Namespace) -> None:
    """After each size, so that a run cut short leaves what it has measured."""
    if arguments.tables:
        tables.save_csv(rows, arguments.tables / "decode.csv")
        tables.write(report(rows, arguments), arguments.tables / "decode.md")


if __name__ == "__main__":
    main()
