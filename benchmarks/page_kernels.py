"""What backends gain beside attention: choosing pages by Quest, and sealing them with their index.

Torch and Numba take turns in one process on the same pages and tokens (see shared/timing.py).

    python benchmarks/page_kernels.py --output docs/tables/page_kernels.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
from shared import tables, timing
from shared.timing import Contestant
from tqdm import tqdm

import pikv
from pikv.adapters.compressors import Int2, Int4, Int8
from pikv.adapters.numba_cpu import NumbaCpu
from pikv.core.exact import Exact
from pikv.core.ports import Backend, Compressor, IndexedPages, NewPages, PageCodec, PageSelector
from pikv.core.tables import new_pages
from pikv.core.tail import Tail
from pikv.core.torch_backend import TorchBackend
from pikv.policies import KeyCodes, Quest

KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 64
LAYER = pikv.LayerConfig(query_heads=32, kv_heads=KV_HEADS, key_dim=HEAD_DIM, value_dim=HEAD_DIM)
CPU = torch.device("cpu")
BACKENDS: dict[str, Backend] = {"torch": TorchBackend(), "numba": NumbaCpu()}
COMPRESSORS: dict[str, Compressor] = {"float32": Exact(), "INT8": Int8(), "INT4": Int4(), "INT2": Int2()}
CONTEXTS = (8192, 32_768, 131_072)  # of which Quest chooses
SEALED_TOKENS = 4096


@attrs.frozen
class Work:
    """Something that every backend does, and how each of them does it."""

    name: str
    contestants: list[Contestant]


def codec_of(compressor: Compressor) -> PageCodec:
    """Pages of the layer, in float32 where numbers are stored."""
    form = compressor.form(LAYER, page_size=PAGE_SIZE, dtype=torch.float32)
    return PageCodec(compressor=compressor, layer=LAYER, form=form)


def choosing(selector: PageSelector, tokens: int) -> Work:
    """Some of so many tokens, by an index in the order that sealing gives it."""
    form, pages = selector.index_form(LAYER, PAGE_SIZE), tokens // PAGE_SIZE
    one = torch.empty(pages * KV_HEADS, *form.shape, dtype=form.dtype)
    selector.index(torch.randn(len(one), PAGE_SIZE, HEAD_DIM), one)
    copies = timing.copies_for(one.nbytes)
    index = one.expand(copies, *one.shape).clone()
    ids = torch.arange(pages * KV_HEADS, dtype=torch.int32).view(pages, 1, KV_HEADS).permute(1, 2, 0).contiguous()
    counts = torch.full((1, KV_HEADS), pages)
    indexed = [IndexedPages(index=each, ids=ids, counts=counts) for each in index]
    query = torch.randn(1, KV_HEADS, LAYER.group, HEAD_DIM)
    contestants = []
    for name, backend in BACKENDS.items():
        kernel = backend.choose(selector, codec_of(Exact()), CPU)
        assert kernel is not None
        run = lambda copy, kernel=kernel: kernel(query, indexed[copy])  # noqa: E731  # a default binds the kernel
        contestants.append(Contestant(name=name, run=run, copies=copies, nbytes=one.nbytes))
    return Work(f"choose of {tokens} tokens: {selector}", contestants)


def sealing(name: str) -> Work:
    """Tokens of the tail become pages in this encoding, with Quest's index."""
    codec = codec_of(COMPRESSORS[name])
    form = codec.form
    keys, values = torch.randn(2, 1, KV_HEADS, SEALED_TOKENS, HEAD_DIM)
    positions = torch.arange(SEALED_TOKENS, dtype=torch.int32).expand(1, KV_HEADS, -1).contiguous()
    tail = Tail(keys, values, positions, torch.full((1, KV_HEADS), SEALED_TOKENS), values.shape[-1])
    page, sequence, head = new_pages(torch.full((1, KV_HEADS), SEALED_TOKENS // PAGE_SIZE))
    new = NewPages(sequence=sequence, head=head, slots=page[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE))
    out = torch.zeros(len(page), form.stride, dtype=torch.uint8)
    contestants = []
    for backend_name, backend in BACKENDS.items():
        kernel = backend.seal(codec, Quest(), CPU)
        assert kernel is not None
        run = lambda _, kernel=kernel: kernel(tail, new, out)  # noqa: E731  # a default binds the kernel
        contestants.append(Contestant(name=backend_name, run=run, copies=1, nbytes=keys.nbytes + values.nbytes))
    return Work(f"seal {SEALED_TOKENS} tokens, {name}", contestants)


def works() -> Iterator[Work]:
    for tokens in CONTEXTS:
        yield choosing(Quest(pages=2048 // PAGE_SIZE), tokens)
    for tokens in CONTEXTS:
        yield choosing(KeyCodes(pages=2048 // PAGE_SIZE), tokens)
    yield choosing(KeyCodes(pages=2048 // PAGE_SIZE, mass=0.9), CONTEXTS[1])
    for name in COMPRESSORS:
        yield sealing(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each backend")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    timing.set_threads(arguments.threads)
    torch.manual_seed(0)
    plain, body = timing.PlainRead(), []
    with tqdm(total=0) as progress:
        for work in works():
            progress.total += len(work.contestants) * arguments.rounds
            times = timing.interleaved(work.contestants, plain, arguments.rounds, progress)
            torch_ms, numba_ms = times["torch"].ms, times["numba"].ms
            fraction = times["numba"].fraction
            body.append(
                (work.name, f"{torch_ms:.3f}", f"{numba_ms:.3f}", f"{torch_ms / numba_ms:.1f}", f"{fraction:.2f}")
            )
    columns = ("work", "torch, ms", "numba, ms", "times faster", "numba: fraction of a plain read")
    heading = (
        f"One layer: 32 query heads, {KV_HEADS} KV heads, head_dim {HEAD_DIM}, page_size {PAGE_SIZE}. Choosing reads "
        "the selector's index of all pages; sealing takes float32 tokens from the tail and writes Quest's index too. "
        f"Medians over {arguments.rounds} rounds of {timing.TIMED_CALLS} cold reads; the last column compares with "
        "reading what goes in."
    )
    text = "\n".join([heading, "", f"{tables.machine()}.", "", tables.command(), "", tables.markdown(columns, body)])
    tables.save(text, arguments.output)


if __name__ == "__main__":
    main()
