"""The byte solver: measures on a calibration text what each saving costs a model, and composes within a cap."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from tqdm import tqdm

from pikv.adapters.transformers.families import model_config
from pikv.core.cache import PiKVCache
from pikv.core.config import LayerConfig, ModelConfig
from pikv.core.errors import ConfigError
from pikv.core.exact import Exact
from pikv.core.ports import Compressor
from pikv.core.reports import StoredBytes
from pikv.core.runtime import RuntimeConfig
from pikv.evaluation.contestants import Composed
from pikv.evaluation.items import Task
from pikv.evaluation.plan import LayerLosses, Plan, solve
from pikv.evaluation.run import Score, encode, evaluate
from pikv.policies import Planned

Pages = tuple[tuple[int, ...], ...]  # of each KV head of each layer


def measure(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    runtime: RuntimeConfig,
    compressors: Sequence[Compressor],
    batch: int = 16,
    chunk: int = 512,
) -> list[LayerLosses]:
    """What each layer of a transformers model loses by each page format, and by each head's pages, in bits a token.

    task: of contexts of one length, such as `continuation(text, ...)` of a calibration text. runtime: the token
    selector, page size, tail and all else; its allocator, budget and compressor are what is solved for. A format is
    tried in one layer at a time, exact elsewhere and whole; a head is cut to 2, 4, 8, ... pages, the others whole. That
    is a pass over the task for each layer and format, and about log2(pages) for each head of each layer. A cut that
    seems to cost less than a lesser one is taken to cost as much, and a format that seems to help to cost nothing:
    that is noise, and to believe it would leave bytes of the cap unused.

    Raises what `evaluate` does; ConfigError without formats, and for a runtime whose token selector keeps everything or
    remembers attention.
    """
    shape, compressors = model_config(model), tuple(compressors)
    _check(runtime, compressors)
    tokens = max(len(encode(tokenizer, item).context) for item in task.items)
    ladder = _ladder(runtime, tokens)
    whole: Pages = tuple((ladder[-1],) * layer.kv_heads for layer in shape.layers)
    everything: tuple[Compressor, ...] = (Exact(),) * len(shape.layers)
    passes = 1 + sum(len(compressors) + layer.kv_heads * (len(ladder) - 1) for layer in shape.layers)

    with tqdm(total=passes, unit="pass", disable=None) as progress:

        def loss(formats: tuple[Compressor, ...], pages: Pages) -> float:
            scores: list[Score] = []
            composed = Composed(name="calibration", runtime=composition(runtime, formats, pages))
            sizes = {"batch": batch, "chunk": chunk}
            evaluate(model, tokenizer, composed, task, **sizes, scored=lambda _, score: scores.append(score))
            progress.update()
            return sum(score.bits for score in scores) / sum(score.tokens for score in scores)

        nothing = loss(everything, whole)
        return [
            LayerLosses(
                formats=tuple(max(0.0, loss(_with(everything, i, each), whole) - nothing) for each in compressors),
                heads=tuple(
                    never_falling(
                        {count: loss(everything, _cut(whole, i, head, count)) - nothing for count in ladder[:-1]}
                        | {ladder[-1]: 0.0}
                    )
                    for head in range(layer.kv_heads)
                ),
                **sizes_of(shape, layer, runtime, compressors),
            )
            for i, layer in enumerate(shape.layers)
        ]


def composed_within(
    cap_bytes: int, losses: Sequence[LayerLosses], *, runtime: RuntimeConfig, compressors: Sequence[Compressor]
) -> tuple[RuntimeConfig, Plan]:
    """The composition that loses least in `cap_bytes`, by what was measured, and the plan behind it.

    cap_bytes: of one sequence, all that `stored_bytes()` counts when a prompt has been read, tails and tables included.
    losses, runtime, compressors: as `measure` gave and took them; one measurement serves any cap.

    Raises ConfigError for a cap below the least that there is.
    """
    plan = solve(losses, cap_bytes=cap_bytes)
    return composition(runtime, tuple(compressors[i] for i in plan.formats), plan.pages), plan


def composition(runtime: RuntimeConfig, formats: tuple[Compressor, ...], pages: Pages) -> RuntimeConfig:
    """The runtime with a page format for each layer and pages for each head."""
    counts = [count for layer in pages for count in layer]
    budget = runtime.tail_tokens + -(-sum(counts) // len(counts)) * runtime.page_size
    return attrs.evolve(runtime, compressor=formats, allocator=Planned(most=pages), budget_tokens=budget)


def sizes_of(
    model: ModelConfig, layer: LayerConfig, runtime: RuntimeConfig, compressors: Sequence[Compressor]
) -> dict[str, tuple[int, ...]]:
    """`page_bytes` and `fixed_bytes` of a layer in each format, read from caches of one sequence and that layer.

    A table is as wide as its longest row, so a page is taken to widen it for all heads: an upper bound.
    """
    least = _sink_pages(runtime)
    page_bytes, fixed_bytes = [], []
    for compressor in compressors:
        few, more = (_stored(model, layer, runtime, compressor, pages) for pages in (least, least + 1))
        page = (more.pages + more.indexes - few.pages - few.indexes) // layer.kv_heads
        page_bytes.append(page := page + more.tables - few.tables)
        fixed_bytes.append(few.total + more.bases - few.bases - layer.kv_heads * least * page)
    return {"page_bytes": tuple(page_bytes), "fixed_bytes": tuple(fixed_bytes)}


def _stored(
    model: ModelConfig, layer: LayerConfig, runtime: RuntimeConfig, compressor: Compressor, pages: int
) -> StoredBytes:
    """What a cache of one layer holds when it has read more than it may keep."""
    alone = ModelConfig.of([layer], dtype=model.dtype, device=model.device)
    pool_bytes = attrs.evolve(runtime, streamer=None, tiers=(), predictor=None, router=None)
    cache = PiKVCache(alone, composition(pool_bytes, (compressor,), ((pages,) * layer.kv_heads,)))
    tokens = runtime.tail_tokens + (pages + 1) * runtime.page_size
    generator = torch.Generator().manual_seed(0)

    def states(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, dim, generator=generator).to(model.device, model.dtype)

    values = states(layer.kv_heads, layer.value_dim) if layer.values == "stored" else None
    cache.update(0, 0, states(layer.kv_heads, layer.key_dim), values)
    cache.attend(0, states(layer.query_heads, layer.key_dim))
    cache.finish_prefill()
    return cache.stored_bytes()


def _check(runtime: RuntimeConfig, compressors: tuple[Compressor, ...]) -> None:
    if runtime.budget_tokens is None:
        raise ConfigError(
            "runtime must have a token_selector that says what leaves, and any budget_tokens, which the solver "
            "replaces; the nearest is Recent(), sinks and a recent window"
        )
    if runtime.remembers is not None:
        raise ConfigError(
            f"{type(runtime.remembers).__name__} remembers the attention of a chunk's tokens until the next one comes, "
            "so its bytes depend on the chunk and no cap can be kept; take a token selector that does not"
        )
    if not compressors:
        raise ConfigError("compressors must name one or more page formats to choose from, got none")


def _sink_pages(runtime: RuntimeConfig) -> int:
    return -(-runtime.token_selector.sinks // runtime.page_size)


def _ladder(runtime: RuntimeConfig, tokens: int) -> list[int]:
    """Numbers of pages to try: the fewest, powers of two, and what holds everything."""
    least = _sink_pages(runtime)
    whole = max(least, -(-(tokens - runtime.tail_tokens) // runtime.page_size))
    return [*_between(least, whole), whole]


def _between(least: int, whole: int) -> Iterator[int]:
    count = least
    while count < whole:
        yield count
        count = max(1, 2 * count)


def never_falling(losses: Mapping[int, float]) -> dict[int, float]:
    """Losses by numbers of pages, each raised to that of any larger number."""
    counts = sorted(losses, reverse=True)
    raised = itertools.accumulate((losses[count] for count in counts), max)
    return dict(sorted(zip(counts, raised, strict=True)))


def _with(formats: tuple[Compressor, ...], layer_id: int, compressor: Compressor) -> tuple[Compressor, ...]:
    return (*formats[:layer_id], compressor, *formats[layer_id + 1 :])


def _cut(pages: Pages, layer_id: int, head: int, count: int) -> Pages:
    layer = pages[layer_id]
    return (*pages[:layer_id], (*layer[:head], count, *layer[head + 1 :]), *pages[layer_id + 1 :])
