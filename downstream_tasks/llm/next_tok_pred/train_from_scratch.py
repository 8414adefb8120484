"""Train a small Mixtral from scratch on text and recall, and say how well it does on data it never saw.

    python downstream_tasks/llm/next_tok_pred/generate_data.py --output /tmp/tiny_data
    python downstream_tasks/llm/next_tok_pred/train_from_scratch.py --data /tmp/tiny_data --output /tmp/tiny_moe

The curriculum's stages are trained one after another and saved, so that a run that was cut off goes on after the last.
All but the last two, which learn the text, end early once their pairs are recalled. The few characters that answer
questions weigh as much as all of the text.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import generate_data
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

IGNORED = -100  # the label that transformers leaves out of a loss
EVALUATION_SEED = 1_000_003
DONE = "stage.json"  # written into the folder of a stage that is trained
CHECKED_STEPS, ENOUGH_RECALL = 100, 0.985  # how often a stage is checked, and when it is learned
BATCH_LENGTH = 256  # characters: --batch_size counts samples of this length, so a step's tokens stay the same


class StageRows(Dataset):
    """The samples of one stage. Labels are [2, tokens]: of the text, and of the answers; IGNORED elsewhere."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as arrays:
            self.ids, self.answers = arrays["ids"], arrays["answers"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.ids[index].astype(np.int64))
        answers = torch.from_numpy(self.answers[index])
        return {
            "input_ids": ids,
            "labels": torch.stack([ids.masked_fill(answers, IGNORED), ids.masked_fill(~answers, IGNORED)]),
        }


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with the ids that `generate_data.token_ids` gives."""
    tokens = [*generate_data.SPECIALS, *generate_data.CHARACTERS]
    tokens += [f"<reserved_{number}>" for number in range(generate_data.VOCABULARY - len(tokens))]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def new_model() -> MixtralForCausalLM:
    """A Mixtral of one million parameters with random weights."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=generate_data.VOCABULARY,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=8192,
            sliding_window=None,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            initializer_range=0.06,  # hidden_size is small: at the usual 0.02, attention to the past forms late
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def text_and_answers(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """The mean loss over the text, plus that over the answers, plus the experts' balance loss."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    text, answers = (
        torch.nn.functional.cross_entropy(logits, labels[:, kind, 1:].flatten(), ignore_index=IGNORED)
        for kind in (0, 1)
    )
    return text + answers + 0.01 * outputs.aux_loss


@torch.inference_mode()
def recall_accuracy(model: MixtralForCausalLM, *, length: int, pairs: int, samples: int) -> float:
    """The share of hidden pairs, in held-out text, whose whole value the model writes greedily.

    The answers are given to the model as they should be; a value counts when its every character is the most
    likely one, which is when greedy decoding would have written it.
    """
    text = generate_data.standard_library(held_out=True)
    rng = np.random.default_rng(EVALUATION_SEED)
    right = asked = 0
    for _ in range(samples):
        sample = generate_data.recall_sample(text, rng, length=length, pairs=pairs)
        ids = torch.from_numpy(generate_data.token_ids(sample.text).astype(np.int64))[None]
        best = model(input_ids=ids).logits[0].argmax(-1)
        for span in sample.answers:
            right += torch.equal(best[span.start - 1 : span.stop - 1], ids[0, span])
        asked += len(sample.answers)
    return right / asked


@torch.inference_mode()
def bits_per_character(model: MixtralForCausalLM, *, length: int = 2048, samples: int = 16) -> float:
    """The mean over held-out passages of -log2 p(next character)."""
    text = generate_data.standard_library(held_out=True)
    rng = np.random.default_rng(EVALUATION_SEED)
    rows = torch.from_numpy(generate_data.text_rows(text, rng, length=length, samples=samples).astype(np.int64))
    losses = [
        torch.nn.functional.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:]).item() for row in rows
    ]
    return float(np.mean(losses) / np.log(2))


def report(model: MixtralForCausalLM, *, samples: int) -> dict[str, float]:
    """What the model does on data it never saw, by the name of each measure."""
    model.eval()
    measures = {"bits per character, held-out text": round(bits_per_character(model), 3)}
    for length in (512, 1024, 2048, 4096):
        for pairs in (8, 32):
            name = f"recall of {pairs} pairs in {length} characters"
            measures[name] = round(recall_accuracy(model, length=length, pairs=pairs, samples=samples), 4)
            print(f"{name}: {measures[name]:.1%}", flush=True)
    return measures


class StopWhenRecalled(TrainerCallback):
    """End a stage early once nearly all of its held-out pairs are recalled."""

    def __init__(self, rows: StageRows) -> None:
        self.pairs = int(rows.answers.sum(1).max()) // generate_data.VALUE_LETTERS  # the most that a sample hides
        self.length = rows.ids.shape[1] - len("@Qxy\n") * self.pairs

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Check every so often, and after the last step."""
        if state.global_step % CHECKED_STEPS == 0 or state.global_step == state.max_steps:
            model.eval()
            accuracy = recall_accuracy(model, length=self.length, pairs=self.pairs, samples=20)
            model.train()
            print(
                f"step {state.global_step}: recall of {self.pairs} pairs in {self.length} is {accuracy:.1%}", flush=True
            )
            control.should_training_stop |= accuracy >= ENOUGH_RECALL


def train_stage(
    model: MixtralForCausalLM, file: Path, arguments: argparse.Namespace, *, scratch: Path, remaining: int
) -> None:
    """Train one stage; `remaining` come after it. Only the last one's learning rate falls; all take the same tokens."""
    rows = StageRows(file)
    length = rows.ids.shape[1]
    settings = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=max(1, arguments.batch_size * BATCH_LENGTH // length),
        learning_rate=arguments.learning_rate,
        num_train_epochs=arguments.num_epochs,
        lr_scheduler_type="constant_with_warmup" if remaining else "cosine",
        warmup_steps=50,
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=arguments.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    callbacks = [StopWhenRecalled(rows)] if remaining > 1 else []
    Trainer(model, settings, train_dataset=rows, compute_loss_func=text_and_answers, callbacks=callbacks).train()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that generate_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="where the trained model goes")
    parser.add_argument("--batch_size", type=int, default=16, help="samples of 256 characters a step")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_epochs", type=int, default=1, help="passes over each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report_samples", type=int, default=100, help="recall samples for each number reported")
    arguments = parser.parse_args()
    if not (arguments.data / "curriculum.json").is_file():
        parser.error(f"--data {arguments.data} has no curriculum.json; run generate_data.py --output {arguments.data}")
    return arguments


def main() -> None:
    """Train, report, save."""
    arguments = parse_arguments()
    set_seed(arguments.seed)
    model, scratch = new_model(), arguments.output / "scratch"
    stages = json.loads((arguments.data / "curriculum.json").read_text())["stages"]
    for remaining, name in zip(reversed(range(len(stages))), stages, strict=True):
        finished = scratch / Path(name).stem
        if (finished / DONE).is_file():
            print(f"{name} was trained before: {finished}", flush=True)
            model = MixtralForCausalLM.from_pretrained(finished)
            continue
        print(name, flush=True)
        started = time.monotonic()
        train_stage(model, arguments.data / name, arguments, scratch=scratch, remaining=remaining)
        model.save_pretrained(finished)
        (finished / DONE).write_text(json.dumps({"minutes": (time.monotonic() - started) / 60}))
    minutes = sum(json.loads(path.read_text())["minutes"] for path in scratch.glob(f"*/{DONE}"))

    model.config.output_router_logits = False  # was for the training's load balance; it breaks generate's second turn
    model.config.use_cache = True
    model.half().save_pretrained(arguments.output)
    character_tokenizer().save_pretrained(arguments.output)
    measures = report(model.float(), samples=arguments.report_samples)
    described = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": arguments.seed,
        "training minutes": round(minutes, 1),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "measures": measures,
    }
    (arguments.output / "report.json").write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
