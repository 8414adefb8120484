"""Which facts of the suite for transformers caches hold for the caches that transformers ships, and for PiKV's.

Caches whose packages are not installed are left out: optimum-quanto and hqq bring back ends of QuantizedCache.

    python benchmarks/cache_conformance.py --output docs/tables/caches-transformers-5.2.0.md
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from hypothesis import Phase, settings
from shared import tables
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

# Mixtures are tried and not made simpler: the named tests already say what fails. Suites take what is set before them.
settings.register_profile(
    "report", max_examples=30, derandomize=True, deadline=None, phases=[Phase.generate], report_multiple_bugs=False
)
settings.load_profile("report")

from pikv.adapters.transformers import attach  # noqa: E402
from pikv.testing.transformers import CacheConformance, DenseCacheConformance  # noqa: E402
from pikv.testing.transformers.models import llama  # noqa: E402

# The default groups of 64 refuse prompts whose number of entries they do not divide: (back end, arguments, tolerance).
GROUPS = {"q_group_size": 16}
INT8 = 0.4
BACKENDS = {
    "quanto 4 bits": ({"backend": "quanto", "nbits": 4, **GROUPS}, 3.5),
    "hqq 4 bits": ({"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1, **GROUPS}, 3.5),
    "hqq 8 bits": ({"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, **GROUPS}, INT8),
    "fp8": ({"backend": "fp8"}, 2.5),
}


class Dynamic(DenseCacheConformance):
    def make(self, model: PreTrainedModel) -> Cache:
        return DynamicCache(config=model.config)


class Static(CacheConformance):
    def make(self, model: PreTrainedModel) -> Cache:
        return StaticCache(config=model.config, max_cache_len=512)


class PiKV(CacheConformance):
    def __init__(self, tolerance: float, **composition: object) -> None:
        self.composition = composition
        self.logit_tolerance = tolerance

    @contextmanager
    def prepare(self, model: PreTrainedModel) -> Iterator[None]:
        with attach(model, self.composition) as self.host:
            yield

    def make(self, model: PreTrainedModel) -> Cache:
        return self.host.new_cache()


class Quantized(DenseCacheConformance):
    def __init__(self, tolerance: float, **arguments: object) -> None:
        self.arguments = arguments
        self.logit_tolerance = self.state_tolerance = tolerance

    def make(self, model: PreTrainedModel) -> Cache:
        return QuantizedCache(config=model.config, **self.arguments)


def suites() -> dict[str, CacheConformance]:
    """A suite for each cache that can be made here."""
    found: dict[str, CacheConformance] = {
        "DynamicCache": Dynamic(),
        "StaticCache": Static(),
        "PiKV": PiKV(1e-4, page_size=16, tail_tokens=4),
        "PiKV int8": PiKV(INT8, page_size=16, tail_tokens=4, compressor="int8"),
    }
    for name, (arguments, tolerance) in BACKENDS.items():
        suite = Quantized(tolerance, **arguments)
        try:
            suite.make(llama())
        except (ImportError, ValueError) as error:  # the package is missing, or this version has no such back end
            print(f"left out: {name}: {error}", file=sys.stderr)
        else:
            found[name] = suite
    return found


def outcome(test: Callable[[], None]) -> str:
    """What was said when the test failed, nothing when it passed."""
    try:
        test()
    except Exception as error:
        first = str(error).splitlines()[0].strip("`")
        return first if isinstance(error, AssertionError) else f"{type(error).__name__}: {first}"
    return ""


def report(suites: dict[str, CacheConformance]) -> str:
    """A table of facts and caches, and what was said of those that do not hold."""
    facts = [name for name in dir(Dynamic) if name.startswith("test_")]
    said = {
        (fact, name): outcome(getattr(suite, fact)) if hasattr(suite, fact) else None
        for name, suite in tqdm(suites.items())
        for fact in facts
    }
    rows = []
    for fact in facts:
        cells = ("" if said[fact, name] is None else "**no**" if said[fact, name] else "yes" for name in suites)
        rows.append([fact.removeprefix("test_"), *cells])
    lines = [tables.markdown(["fact", *suites], rows)]
    for fact in facts:
        for message in dict.fromkeys(said[fact, name] for name in suites if said[fact, name]):
            names = ", ".join(name for name in suites if said[fact, name] == message)
            lines.append(f"- {fact.removeprefix('test_')} ({names}): `{message}`")
    return "\n".join(lines) + "\n"


def drift(cache: Cache, tokens: list[int]) -> list[float]:
    """How far the keys of 64 first tokens are from what was stored, after more tokens: root mean square."""
    random = torch.Generator().manual_seed(0)
    stored = torch.randn(2, 1, 2, 64, 16, generator=random)
    cache.update(*stored, 0)
    errors = []
    for _ in range(max(tokens)):
        keys, _ = cache.update(*torch.randn(2, 1, 2, 1, 16, generator=random), 0)
        errors.append(float((keys[:, :, :64] - stored[0]).square().mean().sqrt()))
    return [errors[count - 1] for count in tokens]


def drifts(suites: dict[str, CacheConformance]) -> str:
    """A table of what rounding anew costs."""
    after = [1, 200, 1000]
    rows = []
    for name, suite in suites.items():
        if isinstance(suite, DenseCacheConformance):
            errors = drift(suite.make(llama()), after)
            rows.append([name, *(f"{error:.4f}" for error in errors)])
    return tables.markdown(["keys off by, after tokens", *map(str, after)], rows)


def versions() -> str:
    """What was run, and what it ran with."""
    packages = ("transformers", "torch", "optimum-quanto", "hqq")
    found = [f"{name} {version(name)}" for name in packages if importlib.util.find_spec(name.partition("-")[0])]
    return ", ".join(found)


def main() -> None:
    """Run every suite, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a Markdown file; the terminal alone by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tolerances = f"PiKV int8: {INT8}, " + ", ".join(f"{name}: {tolerance}" for name, (_, tolerance) in BACKENDS.items())
    here = suites()
    text = (
        f"{versions()}. Logits may differ by 1e-4, those of caches that round by more ({tolerances}). A cell is "
        "empty where the fact is about dense keys and values, which that cache does not return.\n\n"
        f"{tables.command()}\n\n{report(here)}\n{drifts(here)}"
    )
    tables.save(text, arguments.output)


if __name__ == "__main__":
    main()
