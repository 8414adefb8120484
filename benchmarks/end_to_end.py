"""Milliseconds a decoded token of a transformers model, by the cache that it is given and by context.

The model is Mixtral-shaped and its weights are random; caches are filled with random keys and values through their own
update methods, not prefilled. Contestants take turns in one process, each token after other memory has been read (see
shared/timing.py). What a model takes without context is its floor; what lies above it is the cache's.

    python benchmarks/end_to_end.py --tables docs/tables --figures docs/figures
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from shared import figures, tables, timing
from shared.timing import Contestant
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    MixtralConfig,
    MixtralForCausalLM,
    QuantizedCache,
    StaticCache,
)
from transformers.masking_utils import sdpa_mask

CONTEXT = 16_384
CONTEXTS = (2048, 8192, CONTEXT, 32_768, 131_072)
READ_TOKENS, PAGE_SIZE = 2048, 64
ROOM = 1024  # tokens that a run may decode
FLOOR = "no context"
QUEST = {"name": "quest", "pages": READ_TOKENS // PAGE_SIZE, "dense_layers": 0}
PIKV: dict[str, dict[str, Any]] = {
    "PiKV float32": {},
    "PiKV INT8": {"compressor": "int8"},
    "PiKV INT4": {"compressor": "int4"},
    f"PiKV float32, Quest reads {READ_TOKENS}": {"page_selector": QUEST},
    f"PiKV INT8, Quest reads {READ_TOKENS}": {"compressor": "int8", "page_selector": QUEST},
}


@attrs.frozen(kw_only=True)
class Row:
    """A line of the result. over_floor: what the context adds, over a plain read of its bytes."""

    tokens: int
    name: str
    ms: float
    nbytes: int
    read_ms: float
    over_floor: float


def build() -> MixtralForCausalLM:
    """The model, the same for everybody."""
    config = MixtralConfig(
        num_hidden_layers=8,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=1024,
        max_position_embeddings=2 * max(CONTEXTS),
        sliding_window=None,
    )
    return MixtralForCausalLM(config).eval()


def sharing_weights(model: MixtralForCausalLM) -> MixtralForCausalLM:
    """A second model on the same weights, whose attention can be another."""
    shared: MixtralForCausalLM = copy.deepcopy(model, {id(weights): weights for weights in model.parameters()})
    return shared


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """For one token: the query heads of a group as if they were tokens, so that no key is repeated or read twice."""
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(query.shape).transpose(1, 2).contiguous(), None


# --- contestants


def random_states(model: MixtralForCausalLM, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, [1, kv_heads, tokens, head_dim]."""
    keys, values = torch.randn(2, 1, model.config.num_key_value_heads, tokens, model.config.head_dim)
    return keys, values


def fill(cache: Cache, model: MixtralForCausalLM, tokens: int) -> None:
    """Random tokens in every layer of one of transformers' caches."""
    places = {"cache_position": torch.arange(tokens)}
    for layer_id in range(model.config.num_hidden_layers):
        cache.update(*random_states(model, tokens), layer_id, places)


def decoding(name: str, model: MixtralForCausalLM, cache: Cache, nbytes: int) -> Contestant:
    """Decode one more token a call."""
    token = torch.tensor([[1]])

    @torch.no_grad()
    def run(_: int) -> object:
        return model(input_ids=token, past_key_values=cache).logits

    return Contestant(name=name, run=run, copies=1, nbytes=nbytes)


def without_context(model: MixtralForCausalLM, tokens: int) -> Contestant:
    token = torch.tensor([[1]])

    @torch.no_grad()
    def run(_: int) -> object:
        return model(input_ids=token, past_key_values=DynamicCache(config=model.config)).logits

    return Contestant(name=FLOOR, run=run, copies=1, nbytes=sum(weights.nbytes for weights in model.parameters()))


def dynamic(model: MixtralForCausalLM, tokens: int) -> Contestant:
    cache = DynamicCache(config=model.config)
    fill(cache, model, tokens)
    return decoding("DynamicCache", model, cache, _dense_bytes(model, tokens))


def static(model: MixtralForCausalLM, tokens: int) -> Contestant:
    cache = StaticCache(config=model.config, max_cache_len=tokens + ROOM)
    fill(cache, model, tokens)
    return decoding("StaticCache", model, cache, _dense_bytes(model, tokens))


def static_folded(model: MixtralForCausalLM, tokens: int) -> Contestant:
    AttentionInterface.register("folded", folded_attention)
    AttentionMaskInterface.register("folded", sdpa_mask)
    folded = sharing_weights(model)
    folded.set_attn_implementation("folded")
    return attrs.evolve(static(folded, tokens), name="StaticCache, folded group")


def quantized(model: MixtralForCausalLM, tokens: int) -> Contestant:
    cache = QuantizedCache("quanto", model.config, nbits=4)
    fill(cache, model, tokens)
    codes = _dense_bytes(model, tokens) // 8
    return decoding("QuantizedCache, quanto 4 bits", model, cache, codes)


def pikv(name: str) -> Callable[[MixtralForCausalLM, int], Contestant]:
    """A maker: PiKV attached to a model of its own on the same weights."""

    def make(model: MixtralForCausalLM, tokens: int) -> Contestant:
        from pikv.adapters.transformers import attach

        hosted = sharing_weights(model)
        cache = attach(hosted, {"page_size": PAGE_SIZE, **PIKV[name]}).new_cache()
        step = cache.begin(1, tokens, {})
        for layer_id in range(model.config.num_hidden_layers):
            cache.pikv.update(layer_id, step.positions, *random_states(model, tokens))
        step.attended = model.config.num_hidden_layers  # nobody asked: as a prompt of which the answers are not needed
        cache.finish(step)
        contestant = decoding(name, hosted, cache, 0)
        contestant.run(0)  # seals the prompt
        return attrs.evolve(contestant, nbytes=_pikv_bytes(cache.pikv, tokens))

    return make


def _pikv_bytes(cache: Any, tokens: int) -> int:
    """What one token reads: everything, or the indexes and the pages chosen."""
    stored, selector = cache.stored_bytes(), cache.runtime.page_selector
    if selector is None:
        return int(stored.total)
    sealed = (tokens - cache.runtime.tail_tokens) // PAGE_SIZE
    return int(stored.total - stored.pages + stored.pages * min(selector.pages, sealed) // sealed)


def _dense_bytes(model: MixtralForCausalLM, tokens: int) -> int:
    config = model.config
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens


MAKERS: dict[str, Callable[[MixtralForCausalLM, int], Contestant]] = {
    FLOOR: without_context,
    "DynamicCache": dynamic,
    "StaticCache": static,
    "StaticCache, folded group": static_folded,
    "QuantizedCache, quanto 4 bits": quantized,
    **{name: pikv(name) for name in PIKV},
}


def contestants(model: MixtralForCausalLM, tokens: int) -> Iterator[Contestant]:
    """All that are installed; the others are named with the reason."""
    for name, make in MAKERS.items():
        try:
            yield make(model, tokens)
        except ImportError as error:
            tqdm.write(f"{name}: skipped, {error}")


# --- reports


def measure(model: MixtralForCausalLM, tokens: int, plain: timing.PlainRead, rounds: int, progress: tqdm) -> list[Row]:
    """Everybody at one context."""
    chosen = list(contestants(model, tokens))
    progress.total += len(chosen) * rounds
    times = timing.interleaved(chosen, plain, rounds, progress)
    floor = times[FLOOR].ms
    return [
        Row(
            tokens=tokens,
            name=one.name,
            ms=times[one.name].ms,
            nbytes=one.nbytes,
            read_ms=times[one.name].read_ms,
            over_floor=(times[one.name].ms - floor) / times[one.name].read_ms,
        )
        for one in chosen
    ]


def report(rows: list[Row], arguments: argparse.Namespace) -> str:
    """A Markdown table for each context."""
    lines = [
        "Mixtral-shaped model of 8 layers, hidden 512, 8 query heads, 2 KV heads, head_dim 64, 8 experts of 1024 of "
        f"which 2 a token, float32, random weights; transformers' caches and PiKV's (page_size {PAGE_SIZE}, "
        "tail_tokens 128), one sequence. Medians over "
        f"{arguments.rounds} rounds of {timing.TIMED_CALLS} tokens. Above the floor: what a token takes more than "
        "without context, and that over a plain read of the cache's bytes (of the quantized cache its codes alone). "
        "StaticCache and DynamicCache run as shipped (SDPA).",
        "",
        f"{tables.machine()}.",
        "",
        tables.command(),
    ]
    for tokens in dict.fromkeys(row.tokens for row in rows):
        lines += ["", f"### {tokens} tokens of context", ""]
        here = [row for row in rows if row.tokens == tokens]
        floor = next(row.ms for row in here if row.name == FLOOR)
        columns = ("cache", "ms a token", "above the floor, ms", "MB read", "plain reads above the floor")
        body = [
            (row.name, f"{row.ms:.1f}", f"{row.ms - floor:.1f}", f"{row.nbytes / 1e6:.1f}", f"{row.over_floor:.2f}")
            if row.name != FLOOR
            else (row.name, f"{row.ms:.1f}", "", "", "")
            for row in here
        ]
        lines.append(tables.markdown(columns, body).rstrip())
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], folder: Path) -> None:
    names = dict.fromkeys(row.name for row in rows)
    series = {name: [(row.tokens, row.ms) for row in rows if row.name == name] for name in names}
    figures.against_context(series, "ms a token", folder / "end_to_end_ms.svg", logarithmic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="a folder for end_to_end.md and .csv; the terminal by default")
    parser.add_argument("--figures", type=Path, help="a folder for the plot (needs matplotlib); none by default")
    parser.add_argument("--contexts", type=int, nargs="*", default=list(CONTEXTS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="2048 tokens, two rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.contexts, arguments.rounds = [2048], 2
    timing.set_threads(arguments.threads)
    torch.manual_seed(0)
    model, plain = build(), timing.PlainRead()
    rows: list[Row] = []
    with tqdm(total=0) as progress:
        for tokens in arguments.contexts:
            rows += measure(model, tokens, plain, arguments.rounds, progress)
            if arguments.tables:  # after each context, so that a run cut short leaves what it has measured
                tables.save_csv(rows, arguments.tables / "end_to_end.csv")
                tables.write(report(rows, arguments), arguments.tables / "end_to_end.md")
    print(report(rows, arguments))
    if arguments.figures:
        plot(rows, arguments.figures)


if __name__ == "__main__":
    main()
