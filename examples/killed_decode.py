"""A long decode that is killed in the middle, and goes on in another process with the same tokens.

    python examples/killed_decode.py

One process decodes: its pages are streamed to a store while it does, and it commits now and then. It is killed by
SIGKILL. Another process restores what was committed and goes on to the end. Its tokens are compared with those of a
decode that nobody has disturbed; the exit code is 1 if they differ. It needs pikv[transformers,zarr].
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor

import pikv
from pikv.adapters.transformers import HostCache, attach
from pikv.adapters.zarr_store import ZarrStreamer

MODEL = Path(__file__).parents[1] / "downstream_tasks" / "models" / "tiny_moe"
PROMPT = "def area(width, height):\n    return width * height\n\n\n" * 12


def load() -> tuple[transformers.PreTrainedModel, Tensor]:
    """The model, and the prompt's token ids [1, tokens]."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.eval(), tokenizer(PROMPT, return_tensors="pt").input_ids


def decode(model: transformers.PreTrainedModel, cache: HostCache, ids: Tensor, tokens: int) -> Iterator[Tensor]:
    """Read those of ids [1, n] that the cache has not seen, and yield all ids with each of so many tokens."""
    for _ in range(tokens):
        with torch.inference_mode():
            unseen = ids[:, cache.get_seq_length() :]
            logits = model(input_ids=unseen, past_key_values=cache, logits_to_keep=1).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        yield ids


def undisturbed(tokens: int) -> list[int]:
    """What comes without a store and without a kill."""
    model, ids = load()
    with attach(model, pikv.RuntimeConfig(page_size=16, tail_tokens=32)) as host:
        *_, ids = decode(model, host.new_cache(), ids, tokens)
    return ids[0].tolist()


def work(folder: Path, tokens: int, commit_every: int) -> None:
    """Decode until there are so many tokens beside the prompt, from what the store holds if it holds something.

    Prints how many tokens there were at first, and at each commit; at the end all ids.
    """
    model, ids = load()
    stop = ids.shape[1] + tokens
    streamer = ZarrStreamer(folder, keep_versions=2)
    with streamer, attach(model, pikv.RuntimeConfig(page_size=16, tail_tokens=32, streamer=streamer)) as host:
        cache = host.restore() if streamer.versions() else host.new_cache()
        read = ids if cache.token_ids is None else cache.token_ids
        cache.crop(-1)  # the last token is read again, for the logits that come after it
        print("begins with", read.shape[1], flush=True)
        for ids in decode(model, cache, read, stop - read.shape[1]):
            cache.pikv.stream()
            if ids.shape[1] % commit_every == 0:
                cache.commit()
                print("committed", ids.shape[1], flush=True)
    print(*ids[0].tolist())


@contextlib.contextmanager
def worker(folder: Path, arguments: argparse.Namespace) -> Iterator[Iterator[list[str]]]:
    """A process that does `work`; gives the words of each line that it prints, and kills it at the end."""
    command = [sys.executable, __file__, "--store", str(folder), "--tokens", str(arguments.tokens)]
    command += ["--commit-every", str(arguments.commit_every)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield (line.split() for line in process.stdout)
        finally:
            process.send_signal(signal.SIGKILL)


def kill_and_go_on(folder: Path, arguments: argparse.Namespace) -> list[int]:
    """Kill one process when half of the tokens may have come, let another go on; all ids that this one has."""
    commits = 0
    with worker(folder, arguments) as said:
        print("the first process", *next(said), "tokens")
        for words in said:
            print("  it has", *words, "tokens")
            commits += 1
            if commits >= arguments.tokens // arguments.commit_every // 2:
                break
    print("  and is killed")
    with worker(folder, arguments) as said:
        print("another process", *next(said), "tokens, out of the store")
        *_, ids = said
    return [int(word) for word in ids]


def main() -> None:
    """Decode twice, disturbed and not, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000, help="to decode")
    parser.add_argument("--commit-every", type=int, default=100, help="tokens; --tokens must be 4 times that or more")
    parser.add_argument("--store", type=Path, help="only decode, with this store, as the processes do that are killed")
    arguments = parser.parse_args()
    if arguments.commit_every < 1 or arguments.tokens < 4 * arguments.commit_every:
        parser.error(f"--tokens must be 4 * --commit-every or more, got {arguments.tokens}")
    if arguments.store:
        work(arguments.store, arguments.tokens, arguments.commit_every)
        return
    with tempfile.TemporaryDirectory() as folder:
        ids = kill_and_go_on(Path(folder), arguments)
    expected = undisturbed(arguments.tokens)
    agreeing = sum(one == other for one, other in zip(ids, expected, strict=True))
    print(f"{agreeing} of {len(expected)} tokens are those of an undisturbed decode")
    sys.exit(ids != expected)


if __name__ == "__main__":
    main()
