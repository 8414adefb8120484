"""Kernels on a GPU beside torch's attention and other libraries: one layer, one decoded token a sequence.

All take turns in one process, on copies of the pages that together are larger than the GPU's cache; times are medians
by CUDA events. The roof is a copy of as many bytes within the GPU's memory, of which half are read.

    python benchmarks/gpu.py                # on a machine with a GPU: writes docs/tables/gpu.md, .csv and the plot
    python benchmarks/gpu.py --rehearse     # on a CPU: runs everything once on few tokens, and writes nothing
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import torch
import torch.nn.functional as F
from shared import figures, tables
from torch import Tensor

import pikv
from pikv.adapters.compressors import Int2, Int4, Int8
from pikv.adapters.cupy_gpu import CupyGpu
from pikv.core.exact import Exact
from pikv.core.ports import Backend, Compressor, IndexedPages, NewPages, PageCodec, Pages
from pikv.core.tables import all_live
from pikv.core.tail import Tail
from pikv.policies import Quest

KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE = 8, 4, 128, 64
LAYER = pikv.LayerConfig(query_heads=KV_HEADS * GROUP, kv_heads=KV_HEADS, key_dim=HEAD_DIM, value_dim=HEAD_DIM)
BFLOAT = torch.bfloat16
COMPRESSORS: dict[str, Compressor] = {"bf16": Exact(), "INT8": Int8(), "INT4": Int4(), "INT2": Int2()}
BATCHES, CONTEXTS, MOST_TOKENS = (1, 4, 16, 64), (4096, 16_384, 32_768, 131_072), 64 * 32_768
COLD_BYTES, MOST_COPIES, ROUNDS = 1 << 28, 32, 20  # more than a GPU's cache holds
READ_PAGES = 2048 // PAGE_SIZE  # that Quest reads


@attrs.frozen(kw_only=True)
class Result:
    """A median time in ms, the bytes read, and the time of a copy that moves as many in all."""

    work: str
    name: str
    batch: int
    context: int
    nbytes: int
    ms: float
    copy_ms: float

    @property
    def fraction(self) -> float:
        """Of the speed of a copy."""
        return self.copy_ms / self.ms


@attrs.frozen
class Place:
    """Where it runs: a GPU, or for a rehearsal the CPU."""

    device: torch.device
    backend: Backend
    rounds: int

    def time_ms(self, run: Callable[[], object]) -> float:
        """Of one call; on a GPU by events, which wait for its end."""
        if self.device.type == "cpu":
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


@attrs.frozen
class Contestant:
    """One way to do the work on each of some copies; nbytes: that it reads."""

    name: str
    nbytes: int
    runs: list[Callable[[], object]]


class Roof:
    """Copies within the GPU's memory, each of other bytes than the ones before, so that none is in its cache."""

    def __init__(self, place: Place, nbytes: int) -> None:
        """nbytes: that a copy moves, half of them read."""
        self._half = max(1, nbytes // 2)
        room = -(-COLD_BYTES // self._half) if place.device.type == "cuda" else 1
        self._memory = torch.zeros(2, room, self._half, dtype=torch.uint8, device=place.device)
        self._next = 0

    def copy(self) -> None:
        """Copy the next bytes."""
        self._memory[0, self._next].copy_(self._memory[1, self._next])
        self._next = (self._next + 1) % self._memory.shape[1]


def copies_of(nbytes: int) -> int:
    """So many that none is in the cache when its turn comes."""
    return min(MOST_COPIES, max(1, -(-COLD_BYTES // nbytes)))


def measure(place: Place, work: str, batch: int, context: int, contestants: list[Contestant]) -> Iterator[Result]:
    """Let all take turns, each beside its copy, and the first call of each be lost."""
    times: dict[str, tuple[list[float], list[float]]] = {each.name: ([], []) for each in contestants}
    roofs = {each.name: Roof(place, each.nbytes) for each in contestants}
    for turn in range(place.rounds + 1):
        for each in contestants:
            for found, run in zip(
                times[each.name], (each.runs[turn % len(each.runs)], roofs[each.name].copy), strict=True
            ):
                elapsed = place.time_ms(run)
                if turn:
                    found.append(elapsed)
    for each in contestants:
        ms, copy_ms = (statistics.median(found) for found in times[each.name])
        yield Result(
            work=work, name=each.name, batch=batch, context=context, nbytes=each.nbytes, ms=ms, copy_ms=copy_ms
        )


def codec_of(compressor: Compressor) -> PageCodec:
    """Pages of a bfloat16 model."""
    form = compressor.form(LAYER, page_size=PAGE_SIZE, dtype=BFLOAT)
    return PageCodec(compressor=compressor, layer=LAYER, form=form, dtype=BFLOAT)


def pages_of(place: Place, codec: PageCodec, batch: int, context: int) -> list[Pages]:
    """Copies of pages that hold random tokens, in any order in memory: a few pages' bytes many times over."""
    count = batch * KV_HEADS * context // PAGE_SIZE
    some = torch.randn(2, 16, PAGE_SIZE, HEAD_DIM, device=place.device).to(BFLOAT)
    positions = torch.arange(PAGE_SIZE, dtype=torch.int32, device=place.device).expand(16, -1)
    few = torch.zeros(16, codec.form.stride, dtype=torch.uint8, device=place.device)
    codec.compressor.encode(codec.form, *some, positions, few)
    slab = few.repeat(-(-count // 16), 1)[:count]
    rows = torch.randperm(count, device=place.device).int().view(batch, KV_HEADS, -1)
    live = torch.full(rows.shape, all_live(PAGE_SIZE), device=place.device)
    return [
        Pages(slab=slab.clone(), rows=rows, live=live, run=None) for _ in range(copies_of(count * codec.form.stride))
    ]


def attention(place: Place, batch: int, context: int) -> list[Contestant]:
    """PiKV's kernel on each form, and its peers on tokens side by side."""
    query = torch.randn(batch, KV_HEADS, GROUP, HEAD_DIM, device=place.device).to(BFLOAT)
    contestants = []
    for name, compressor in COMPRESSORS.items():
        codec = codec_of(compressor)
        kernel, pages = place.backend.attend(codec, place.device), pages_of(place, codec, batch, context)
        assert kernel is not None
        runs = [lambda kernel=kernel, each=each: kernel(query, each) for each in pages]
        nbytes = batch * KV_HEADS * context // PAGE_SIZE * codec.form.stride
        contestants.append(Contestant(f"PiKV {name}", nbytes, runs))
    return [*contestants, *peers(place, query, batch, context)]


def peers(place: Place, query: Tensor, batch: int, context: int) -> Iterator[Contestant]:
    """Torch with the group folded into the queries or named, flex attention, and libraries that are installed."""
    nbytes = 2 * batch * KV_HEADS * context * HEAD_DIM * BFLOAT.itemsize
    shape = (copies_of(nbytes), 2, batch, KV_HEADS, context, HEAD_DIM)
    states = torch.randn(shape, device=place.device, dtype=BFLOAT)
    flat = query.flatten(1, 2)[:, :, None]  # [batch, query heads, 1, head_dim]

    def each(run: Callable[[Tensor, Tensor], object]) -> list[Callable[[], object]]:
        return [lambda copy=copy: run(*copy) for copy in states]

    yield Contestant(
        "torch SDPA, folded", nbytes, each(lambda k, v: F.scaled_dot_product_attention(query, k, v, scale=LAYER.scale))
    )
    yield Contestant(
        "torch SDPA, enable_gqa",
        nbytes,
        each(lambda k, v: F.scaled_dot_product_attention(flat, k, v, scale=LAYER.scale, enable_gqa=True)),
    )
    if place.device.type == "cpu":
        return
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention)
    yield Contestant("torch flex attention", nbytes, each(lambda k, v: flex(flat, k, v, enable_gqa=True)))
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        runs = each(lambda k, v: flash_attn_with_kvcache(flat.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
        yield Contestant("flash-attn", nbytes, runs)
    if importlib.util.find_spec("flashinfer"):
        yield Contestant("FlashInfer", nbytes, _flashinfer(place, states, flat[:, :, 0], batch, context))


def _flashinfer(place: Place, states: Tensor, query: Tensor, batch: int, context: int) -> list[Callable[[], object]]:
    """Its paged decoding, on pages of 16 tokens: [pages, 2, kv_heads, tokens, head_dim]."""
    import flashinfer

    size = 16
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=place.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    count = context // size
    first = torch.arange(batch + 1, dtype=torch.int32, device=place.device) * count
    pages = torch.arange(batch * count, dtype=torch.int32, device=place.device)
    last = torch.full((batch,), size, dtype=torch.int32, device=place.device)
    wrapper.plan(first, pages, last, KV_HEADS * GROUP, KV_HEADS, HEAD_DIM, size, data_type=BFLOAT, q_data_type=BFLOAT)
    paged = [
        copy.view(2, batch, KV_HEADS, count, size, HEAD_DIM).permute(1, 3, 0, 2, 4, 5).flatten(0, 1).contiguous()
        for copy in states
    ]
    return [lambda each=each: wrapper.run(query, each) for each in paged]


def reading_some(place: Place, context: int) -> list[Contestant]:
    """Quest chooses and attention reads what it chose, beside reading everything; bfloat16, one sequence."""
    codec, selector = codec_of(Exact()), Quest(pages=READ_PAGES)
    attend, choose = place.backend.attend(codec, place.device), place.backend.choose(selector, codec, place.device)
    assert attend is not None
    assert choose is not None
    query = torch.randn(1, KV_HEADS, GROUP, HEAD_DIM, device=place.device).to(BFLOAT)
    all_runs: list[Callable[[], object]] = []
    some_runs: list[Callable[[], object]] = []
    copies = pages_of(place, codec, 1, context)
    for pages in copies:
        index = torch.randn(pages.rows.numel(), 2, HEAD_DIM, device=place.device).half().sort(1).values
        counts = torch.full((1, KV_HEADS), pages.rows.shape[2])
        indexed = IndexedPages(index=index, ids=pages.rows, counts=counts)

        def some(pages: Pages = pages, indexed: IndexedPages = indexed) -> object:
            columns = choose(query, indexed).columns
            rows, live = pages.rows.gather(-1, columns), pages.live.gather(-1, columns)
            return attend(query, Pages(slab=pages.slab, rows=rows, live=live, run=None))

        all_runs.append(lambda pages=pages: attend(query, pages))
        some_runs.append(some)
    count, stride = KV_HEADS * context // PAGE_SIZE, codec.form.stride
    read = KV_HEADS * min(READ_PAGES, context // PAGE_SIZE) * stride + count * 4 * HEAD_DIM
    return [Contestant("PiKV bf16, everything", count * stride, all_runs), Contestant("PiKV Quest", read, some_runs)]


def sealing(place: Place, tokens: int) -> list[Contestant]:
    """Tokens of a bfloat16 tail become pages with Quest's index; bytes read and written together."""
    states = torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, device=place.device).to(BFLOAT)
    positions = torch.arange(tokens, dtype=torch.int32, device=place.device).expand(1, KV_HEADS, -1).contiguous()
    tail = Tail(states[0], states[1], positions, torch.full((1, KV_HEADS), tokens), HEAD_DIM)
    count = tokens // PAGE_SIZE
    head = torch.arange(KV_HEADS).repeat(count)
    slots = torch.arange(tokens).view(count, 1, PAGE_SIZE).expand(-1, KV_HEADS, -1).flatten(0, 1)
    new = NewPages(sequence=torch.zeros_like(head), head=head, slots=slots)
    contestants = []
    for name, compressor in COMPRESSORS.items():
        codec = codec_of(compressor)
        kernel = place.backend.seal(codec, Quest(), place.device)
        assert kernel is not None
        out = torch.zeros(len(head), codec.form.stride, dtype=torch.uint8, device=place.device)
        nbytes = states.nbytes + out.nbytes
        contestants.append(Contestant(f"PiKV {name}", nbytes, [lambda kernel=kernel, out=out: kernel(tail, new, out)]))
    return contestants


def run(place: Place, batches: tuple[int, ...], contexts: tuple[int, ...], sealed: int) -> Iterator[Result]:
    """Everything, as far as it fits."""
    for batch in batches:
        for context in contexts:
            if batch * context <= MOST_TOKENS:
                yield from measure(place, "attend", batch, context, attention(place, batch, context))
    for context in contexts:
        yield from measure(place, "attend to some", 1, context, reading_some(place, context))
    yield from measure(place, "seal", 1, sealed, sealing(place, sealed))


def report(results: list[Result], name: str) -> str:
    """A table, with the card's name."""
    columns = ["work", "who", "batch", "tokens", "MB", "ms", "GB/s", "fraction of a copy"]
    rows = [
        (
            each.work,
            each.name,
            each.batch,
            each.context,
            f"{each.nbytes / 1e6:.1f}",
            f"{each.ms:.4f}",
            f"{each.nbytes / each.ms / 1e6:.0f}",
            f"{each.fraction:.2f}",
        )
        for each in results
    ]
    about = (
        f"{name}, torch {torch.__version__}. One layer: {KV_HEADS * GROUP} query heads, {KV_HEADS} KV heads, head_dim "
        f"{HEAD_DIM}, page_size {PAGE_SIZE}, no tail. Medians of {ROUNDS} calls by CUDA events; a copy within the "
        "GPU's memory reads one half of the bytes and writes the other."
    )
    return f"{about}\n\n{tables.command()}\n\n{tables.markdown(columns, rows)}"


def main() -> None:
    """Measure on a GPU, or rehearse on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="few tokens on a CPU; writes nothing")
    parser.add_argument("--output", type=Path, default=Path("docs/tables/gpu.md"))
    arguments = parser.parse_args()
    if arguments.rehearse:
        from pikv.testing.cuda_on_host import HostRunner

        rehearsal = Place(torch.device("cpu"), CupyGpu(runner=HostRunner()), rounds=1)
        done = list(run(rehearsal, (1,), (64,), 64))
        print(f"rehearsed on a CPU, which says nothing of speed: {len(done)} contestants ran")
        return
    if not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None:
        parser.error("a GPU that torch finds, and cupy, are needed; --rehearse runs on a CPU")
    results = list(run(Place(torch.device("cuda"), CupyGpu(), ROUNDS), BATCHES, CONTEXTS, 32_768))
    tables.save(report(results, torch.cuda.get_device_name()), arguments.output)
    tables.save_csv(results, arguments.output.with_suffix(".csv"))
    lines: dict[str, list[tuple[int, float]]] = {}
    for each in results:
        if each.work == "attend" and each.batch == 1:
            lines.setdefault(each.name, []).append((each.context, each.ms))
    figure = Path("docs/figures/gpu_decode_ms.svg")
    figures.against_context(lines, f"ms, {torch.cuda.get_device_name()}", figure, logarithmic=True)


if __name__ == "__main__":
    main()
