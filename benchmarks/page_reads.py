"""How much a small model still recalls when each token reads a few of its pages: quality against bytes read.

The model of downstream_tasks/models/tiny_moe reads a text in which `@Qxy` lines are hidden, and then answers questions
token by token, for each page selector from the same keys and values. A value counts if its every character is the most
likely one. Keys and values are stored in float16. Texts are held out from the model's training, and made with a seed
that nothing was chosen by (selectors were, by seed 77).

    python benchmarks/page_reads.py --output docs/tables/page_reads.md --figure docs/figures/page_reads.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import attrs
import numpy as np
import torch
from shared import figures, small_model, tables
from shared.small_model import Half, Mixtral, generate_data
from torch import Tensor
from tqdm import tqdm

import pikv
from pikv.core.ports import PageSelector
from pikv.core.ports.transport import Solo
from pikv.policies import KeyCodes, Quest
from pikv.testing.true_mass import TrueMass

TAIL_TOKENS = 32
RESAMPLED = 10_000  # bootstrap samples


@attrs.frozen
class Composition:
    """A page selector with pages of this size; None reads everything. Those of one family are a line of the plot."""

    family: str
    setting: str
    page_size: int
    selector: PageSelector | None


def compositions() -> list[Composition]:
    """Everything first; then each family from few reads to many."""
    found = [Composition("everything", "", 16, None)]
    for pages in (5, 10, 20):
        found.append(Composition("Quest", f"{pages} pages", 16, Quest(pages=pages, dense_layers=0)))
    for bits, page_size, counts in ((1, 16, (5, 10)), (2, 16, (3, 5, 10)), (2, 32, (2, 4, 5)), (4, 16, (5, 10))):
        for pages in counts:
            name = f"KeyCodes, {bits} bit{'s' * (bits > 1)}"
            found.append(Composition(name, f"{pages} pages", page_size, KeyCodes(bits=bits, pages=pages)))
    for mass in (0.6, 0.7, 0.8, 0.9):
        selector = KeyCodes(bits=2, mass=mass, pages=40)
        found.append(Composition("KeyCodes, 2 bits, by mass", f"{mass}", 16, selector))
    for pages in (5, 10):
        found.append(Composition("true mass", f"{pages} pages", 16, TrueMass(pages=pages)))
    return found


@attrs.define
class Result:
    """Of one composition: what was recalled in each text, and for each batch of texts what was read."""

    recalled: list[float] = attrs.field(factory=list)
    reads: list[pikv.PageReads] = attrs.field(factory=list)

    def share(self, what: str) -> float:
        """Of the bytes of all pages, page_bytes or index_bytes; 1 and 0 where everything is read."""
        if not self.reads:
            return float(what == "page_bytes")
        return sum(getattr(reads, what) for reads in self.reads) / sum(reads.stored_bytes for reads in self.reads)

    def left_out(self, what: str) -> float | None:
        """The mean share of attention that was not read: left_out, as estimated, or true_left_out."""
        shares = [getattr(layer, what) for reads in self.reads for layer in reads.layers.values()]
        return None if not shares or None in shares else float(np.mean(shares))


def filled(shape: pikv.ModelConfig, states: list[pikv.ContextKV], composition: Composition) -> pikv.PiKVCache:
    """A cache of these keys and values, sealed."""
    cache = pikv.compose(
        shape, page_selector=composition.selector, page_size=composition.page_size, tail_tokens=TAIL_TOKENS
    )
    for layer_id, context in enumerate(states):
        cache.update(layer_id, 0, context.keys, context.values)
    cache.finish_prefill()
    return cache


def answered(model: Mixtral, cache: pikv.PiKVCache, ids: Tensor, sample: generate_data.Sample) -> list[float]:
    """The share of values recalled in each text of a batch."""
    return small_model.answers(model, Half(cache), ids, sample).double().mean(1).tolist()


def measure(model: Mixtral, pairs: int, samples: int, arguments: argparse.Namespace) -> list[Result]:
    """All compositions on so many texts with so many pairs."""
    shape, chosen = small_model.shape_of(model, torch.float16), compositions()
    results = [Result() for _ in chosen]
    batches = list(small_model.batches(arguments.length, pairs, samples, arguments.batch, seed=arguments.seed))
    progress = tqdm(total=len(batches) * len(chosen), desc=f"{pairs} pairs")
    for batch in batches:
        ids, prompt = small_model.ids_of(batch), pikv.PiKVCache(shape)
        small_model.read(model, Half(prompt), ids[:, : batch[0].question_start], arguments.chunk)
        states = [prompt.retrieve(layer_id) for layer_id in range(len(shape.layers))]
        for composition, result in zip(chosen, results, strict=True):
            progress.set_postfix_str(f"{composition.family} {composition.setting}")
            cache = filled(shape, states, composition)
            if composition.selector is None:
                result.recalled += answered(model, cache, ids, batch[0])
            else:
                with cache.auditing_reads():
                    result.recalled += answered(model, cache, ids, batch[0])
                result.reads.append(cache.page_reads())
            progress.update()
    progress.close()
    return results


def interval(recalled: list[float], everything: list[float]) -> tuple[float, float]:
    """The mean difference to reading everything, in points, and half of its 95 % bootstrap interval; texts in pairs."""
    differences = 100 * (np.array(recalled) - np.array(everything))
    rng = np.random.default_rng(0)
    means = rng.choice(differences, size=(RESAMPLED, len(differences))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(differences.mean()), float(high - low) / 2


def rows(results: list[Result]) -> list[tuple[str, ...]]:
    """Lines of the table."""
    made = []
    for composition, result in zip(compositions(), results, strict=True):
        mean, half = interval(result.recalled, results[0].recalled)
        pages, index = result.share("page_bytes"), result.share("index_bytes")
        shares = [result.left_out(what) for what in ("left_out", "true_left_out")]
        made.append(
            (
                f"{composition.family}{', ' * bool(composition.setting)}{composition.setting}",
                str(composition.page_size),
                f"{100 * np.mean(result.recalled):.1f}",
                f"{mean:+.1f} ± {half:.1f}" if composition.selector else "",
                f"{100 * pages:.1f}",
                "" if isinstance(composition.selector, TrueMass) else f"{100 * (pages + index):.1f}",
                *("" if share is None else f"{100 * share:.1f}" for share in shares),
            )
        )
    return made


COLUMNS = (
    "selector",
    "page size",
    "recalled, %",
    "beside everything, points",
    "pages read, %",
    "pages and index, %",
    "left out, estimated, %",
    "left out, measured, %",
)


def table(by_pairs: dict[int, list[Result]], arguments: argparse.Namespace) -> str:
    """A Markdown table for each number of pairs."""
    heading = (
        f"Pairs hidden in {arguments.length} characters (seed {arguments.seed}); keys and values in float16, a tail of "
        f"{TAIL_TOKENS} tokens and what fills no page beside the pages. Differences to "
        "reading everything are on the same texts, with 95 % bootstrap intervals. Bytes read are of each question "
        "token, as shares of the bytes of all pages. Left out: the share of attention to pages that were not read, the "
        "mean over layers and heads. The true mass is no selector to use: its index is as large as the keys."
    )
    parts = [heading, tables.command()]
    for pairs, results in by_pairs.items():
        parts += [f"{pairs} pairs, {len(results[0].recalled)} texts:", tables.markdown(COLUMNS, rows(results)).rstrip()]
    return "\n\n".join(parts) + "\n"


def figure(by_pairs: dict[int, list[Result]], output: Path) -> None:
    """Recall against what is read, a panel for each number of pairs."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for pairs, results in by_pairs.items():
        panel = panels.setdefault(f"{pairs} pairs", {})
        for composition, result in zip(compositions(), results, strict=True):
            index = 0.0 if isinstance(composition.selector, TrueMass) else result.share("index_bytes")
            line = panel.setdefault(f"{composition.family}, pages of {composition.page_size}", [])
            line.append((100 * (result.share("page_bytes") + index), 100 * float(np.mean(result.recalled))))
    figures.lines(panels, "bytes read, index included, % of all pages", "recalled, %", output)


def main() -> None:
    """Measure every composition, write the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=small_model.MODEL)
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    parser.add_argument("--figure", type=Path, help="a plot; none by default")
    parser.add_argument("--length", type=int, default=2048, help="characters of the text")
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--samples", type=int, nargs="+", default=[128, 64], help="texts, for each number of pairs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the prompt at a time")
    parser.add_argument("--seed", type=int, default=3141, help="of the texts")
    arguments = parser.parse_args()
    model = Mixtral(arguments.model, Solo())
    by_pairs = {
        pairs: measure(model, pairs, samples, arguments)
        for pairs, samples in zip(arguments.pairs, arguments.samples, strict=True)
    }
    tables.save(table(by_pairs, arguments), arguments.output)
    if arguments.figure:
        figure(by_pairs, arguments.figure)


if __name__ == "__main__":
    main()
